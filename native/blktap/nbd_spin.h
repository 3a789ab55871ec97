// Whether a connection's thread looks for the next request a moment before it sleeps.
#pragma once

#include "common/spin.h"

namespace sf::nbd {

struct Spin final : sf::Spin {
  // SNOWFLOCK_NBD_SPIN=0: never, in connections made from now on.
  Spin() : sf::Spin("SNOWFLOCK_NBD_SPIN") {}
};

}  // namespace sf::nbd
