// Zip's CRC-32 at the speed of memory, by multiplying polynomials.
#pragma once

#include <cstdint>

namespace isomorph {

// Writes 16 bytes to `folded` whose CRC-32 from register 0 is that of `bytes` of data (a multiple of 64, not 0) from
// `state`. False where the processor has no carry-less product.
bool fold_crc32(const uint8_t* data, int64_t bytes, uint32_t state, uint8_t* folded);

}  // namespace isomorph
