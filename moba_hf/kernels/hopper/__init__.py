"""The Gluon kernels for Hopper. Only `dispatch` may be imported without Gluon; it says where they run."""
