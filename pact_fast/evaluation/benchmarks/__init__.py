"""The built-in benchmarks, one file each; every module here is imported when a benchmark is looked up."""
