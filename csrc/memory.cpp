// Huge pages for large buffers that are used again and again: 128 MiB are 32,768 pages of 4 KiB, more than a processor keeps
// the addresses of, or 64 of 2 MiB.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

// Asks the system to back the tensor's memory with huge pages; a hint, without effect on its contents.
void advise_huge_pages(torch::stable::Tensor t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const auto first = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t last = first + static_cast<uintptr_t>(t.numel()) * t.element_size();
  const uintptr_t begin = (first + kHuge - 1) / kHuge * kHuge, end = last / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) { m.def("advise_huge_pages(Tensor(a!) t) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) { m.impl("advise_huge_pages", TORCH_BOX(&advise_huge_pages)); }
