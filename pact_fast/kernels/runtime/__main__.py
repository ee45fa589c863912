"""python -m pact_fast.kernels.runtime: compile the C++ kernels ahead of time and print the path of the library."""

import sys

from pact_fast.kernels.runtime.build import BuildError, build

try:
    print(build())
except BuildError as error:
    sys.exit(str(error))
