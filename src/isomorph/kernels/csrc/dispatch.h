// The backend in use: the best this CPU has, or the one asked for.
#pragma once

#include <string>
#include <vector>

#include "backend.h"

namespace isomorph {

std::vector<const Backend*> available_backends();  // best first
const Backend& backend();
bool choose_backend(const std::string& name);  // false when it is not available here

}  // namespace isomorph
