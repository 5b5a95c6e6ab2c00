// Large memory pages for results.
#pragma once

#include <cstddef>

namespace fused_sce::cpu {

// Asks the operating system to back memory that was never written with large pages. Changes no byte; does nothing for
// small memory and where there are no large pages.
//
// malloc takes each result beyond 32 MiB as untouched pages from the system, and the first write to each 4 KiB is a
// page fault: 9,606 of them for 1024 x 9605 float32 logits, more than half of the time of loss and gradient. With pages
// of 2 MiB there are 37. By default Linux uses large pages only where a program asks for them
// (/sys/kernel/mm/transparent_hugepage/enabled: madvise).
void prefer_large_pages(void* data, size_t bytes);

}  // namespace fused_sce::cpu
