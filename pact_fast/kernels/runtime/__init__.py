"""Shared by all kernels: compilation of the C++ library, choice of a backend, and working memory kept between calls."""
