// AVX-512: masks for the remainder of a loop over lanes.

#pragma once

#ifdef __AVX512F__

#include <immintrin.h>

#include <cstdint>

namespace pact_fast {

// Mask of the first `count` of 16 lanes; count may be negative or greater than 16.
inline __mmask16 lane_mask16(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// The same for 32 lanes.
inline __mmask32 lane_mask32(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

}  // namespace pact_fast

#endif
