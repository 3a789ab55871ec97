// The options of `policy` in serve(), as JavaScript gives them.
#pragma once

#include "mcdist/js_common.h"
#include "mcdist/policy_config.h"

namespace sf::mcdist {

// Undefined: the defaults. Throws E_ARGUMENT.
PolicyConfig policy_of(const Napi::Value& value);

// A record of first faults as an opaque Buffer, for `history` of the next generation's policy.
Napi::Value history_value(Napi::Env env, const std::vector<HistoryEntry>& entries);

}  // namespace sf::mcdist
