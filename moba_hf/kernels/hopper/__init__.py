"""The Gluon kernels for Hopper. Only `dispatch`, which decides when to use them, imports without Gluon."""
