#include "cpu/kernels/channel_stats.h"

#include "cpu/kernels/blocks.h"
#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/statistics.h"

namespace densenet_efficient::CPU_CAPABILITY {
namespace {

constexpr int64_t kTileRows = 128;  // a block stays in the second-level cache between the two passes over it

template <typename S>
void statistics_of(const ChannelStats& p) {
  using A = Accumulate<S>;
  const auto* x = static_cast<const S*>(p.x);
  TileStatistics<A> statistics(ceil_div(p.rows, kTileRows), p.channels);
  parallel_blocks(p.rows, p.channels, kTileRows, [&](const Block& block) {
    A* mean = statistics.mean(block.tile) + block.column;
    tile_statistics(x + block.row * p.x_stride + block.column, p.x_stride, block.rows, block.columns, mean,
                    mean + p.channels);
    if (block.column == 0) statistics.set_count(block.tile, block.rows);
  });
  statistics.merge(static_cast<A*>(p.mean), static_cast<A*>(p.variance));
}

}  // namespace

void channel_stats(const ChannelStats& arguments) {
  dispatch_storage(arguments.dtype, [&]<typename S>() { statistics_of<S>(arguments); });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
