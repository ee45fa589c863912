#!/usr/bin/env bash
# Builds the C++ kernels with AddressSanitizer and runs their tests on small shapes, in less than a minute.
#
#     tests/run_asan.sh [pytest arguments]
#
# Besides the heap it watches the gaps between the pieces of a thread's scratch (csrc/common/scratch.h). Code of libtorch,
# BRGEMM included, and masked AVX-512 loads and stores are not instrumented. Needs GCC.
set -euo pipefail
cd "$(dirname "$0")/.."

compiler=${CXX:-c++}
export PACT_FAST_CXXFLAGS="-O0 -g1 -fsanitize=address -fno-omit-frame-pointer"
export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
"${PYTHON:-python}" -m pact_fast.kernels.runtime # before the runtime is preloaded: it would slow down the compiler

# libstdc++ as well, or the runtime does not find the function that throws exceptions
runtime="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libstdc++.so.6)"
LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=0:exitcode=99 "${PYTHON:-python}" -m pytest -q -p no:cacheprovider --capture=sys \
  tests/test_gemm_fp32.py tests/test_gemm_bf16.py tests/test_softmax_bf16.py \
  tests/test_softmax.py tests/test_attention_cpp.py tests/test_pointwise.py tests/test_decoding_kernels.py \
  -k "not triton and not 20000 and not 4099 and not 2500 and not 256 and not 64-4-2" "$@"
