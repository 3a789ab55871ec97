// NBD_CMD_BLOCK_STATUS: what lies where, for each metadata context that was negotiated.
#pragma once

#include "blktap/nbd_export.h"

namespace sf::nbd {

// Fills in job->reply: one chunk for each of job->contexts, the last one marked as done. A chunk
// holds at most 4,096 extents and speaks of at most 1 GiB, but of one extent at least, none of them
// beyond the request. Neighbours differ in state.
void block_status(const Device& device, Job* job);

}  // namespace sf::nbd
