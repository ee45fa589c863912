// Huge pages for large buffers that are reused: 128 MiB are 32,768 pages of 4 KiB, more than the TLB holds, or 64
// of 2 MiB.

#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "common/tensor.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pact_fast {
namespace {

// Asks the system to back the tensor's memory with huge pages: a hint, its contents stay.
void advise_huge_pages(Tensor t) {
  STD_TORCH_CHECK(t.is_contiguous(), "pact_fast: t must be contiguous");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const auto first = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t last = first + static_cast<uintptr_t>(t.numel()) * t.element_size();
  const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage, end = last / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace pact_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) { m.def("advise_huge_pages(Tensor(a!) t) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) { m.impl("advise_huge_pages", TORCH_BOX(&pact_fast::advise_huge_pages)); }
