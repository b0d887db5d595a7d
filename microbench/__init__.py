"""The benchmark command line: checks, times and compiles the kernels on the shapes that matter."""
