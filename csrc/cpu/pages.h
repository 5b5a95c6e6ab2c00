// Memory pages of a result that is about to be written for the first time.
#pragma once

#include <cstddef>

namespace fused_sce::cpu {

// Asks the operating system to back fresh memory with large pages, if it is large. Only a request: nothing happens
// where there are none, and no byte is changed.
//
// A result beyond 32 MiB comes from malloc as untouched pages every time, and touching it for the first time is one
// page fault for each 4 KiB: at 1024 x 9605 float32 logits 9,606 faults, more than half of the time of loss and
// gradient. With pages of 2 MiB it is 37. Linux leaves the choice to the program by default
// (/sys/kernel/mm/transparent_hugepage/enabled: madvise).
void prefer_large_pages(void* data, size_t bytes);

}  // namespace fused_sce::cpu
