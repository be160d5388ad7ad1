#pragma once

/// Of the memory that torch and XLA lend the kernels.
#include <cstddef>

namespace gateloop::host {

/// An output about to be written whole. Above malloc's largest pool every output is fresh memory,
/// which the system hands out page by page as it is touched: 134 MB in pages of 4 KiB cost 60 ms,
/// of 2 MiB 8 ms, and the recurrence that writes them 12. Where the system has no large pages, or
/// `data` comes from a pool, nothing changes.
void ask_for_large_pages(void* data, std::size_t bytes);

}  // namespace gateloop::host
