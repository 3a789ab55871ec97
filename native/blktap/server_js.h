// Handles by which devices (disks, views of generations) reach NBD servers through JavaScript.
#pragma once

#include <memory>

#include "blktap/device.h"
#include "common/js.h"

namespace sf {

// Taken by NbdServer.addExport(). Does not keep the device alive: a handle that waits to be
// collected would keep a closed disk's files open.
Napi::Value wrap_device(Napi::Env env, const std::shared_ptr<Device>& device);
std::shared_ptr<Device> unwrap_device(const Napi::Value& value);  // throws E_ARGUMENT, E_CLOSED

}  // namespace sf
