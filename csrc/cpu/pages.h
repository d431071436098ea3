// Large buffers that are made of the pages of freed ones, whatever their sizes.
//
// A fresh page costs about as much time as ten passes over it. So freed pages are kept, where they are: a buffer lies
// at the first free addresses that suffice, and a step that is repeated finds its buffers where the last one had them.
// What is without a page there gets those of other free addresses, where the system moves pages (mremap of Linux).
#pragma once

#include <cstddef>
#include <set>

#include "cpu/address_ranges.h"

namespace densenet_efficient {

class Pages {
 public:
  Pages();

  // Buffers are whole multiples: a multiple of every system's page, and large enough that few are moved apart.
  static constexpr size_t kMultiple = 1 << 16;

  // At least ``bytes``, with whatever its pages held before; an empty range where the system refuses.
  AddressRange take(size_t bytes);

  void keep(AddressRange buffer);

  // Gives all that is kept back to the system.
  void let_all_go();

 private:
  // One call of the system moves what was never moved apart. Fresh pages cost less than a call for fewer bytes.
  static constexpr size_t kWorthMoving = 1 << 18;

  // What is held is never more than was in use at once, but for so many bytes: they spare most moves.
  static constexpr size_t kSpare = 1 << 21;

  char* place(size_t bytes);
  void fill(AddressRange gap);
  AddressRange take_kept(size_t bytes);

  const AddressRange reserved_;                     // addresses of this object's own
  char* top_;                                       // from here on none of them was ever used
  AddressRanges free_, kept_;                       // addresses, and those of them that have pages
  std::set<char*> seams_;                           // between pages that the system moves by different calls
  size_t in_use_ = 0, most_in_use_ = 0, held_ = 0;  // bytes; what is held is in use or kept
};

}  // namespace densenet_efficient
