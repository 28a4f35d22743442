// The enumerations that device code includes under this name.
#pragma once

#include "types.h"
