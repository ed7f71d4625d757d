#pragma once

#include "ptx/mbarrier.h"
#include "ptx/tma.h"
#include "tile/row_coordinates.h"

namespace tilewright {

// Rows of a head into a SharedTile, whose bytes complete on `full`, together with more_bytes that the caller loads.
template <class Tile>
__device__ __forceinline__ void load_shared(Tile& tile, const CUtensorMap* map, uint64_t* full, int head,
                                            const RowCoordinates& rows, uint32_t more_bytes = 0) {
  ptx::mbarrier_arrive_expect(full, Tile::kBytes + more_bytes);
  for (int i = 0; i < Tile::kChunks; ++i) {
    ptx::tma_load_5d(tile.chunk(i), map, full, i * 64, head, rows.row, rows.outer, rows.wrap);
  }
}

}  // namespace tilewright
