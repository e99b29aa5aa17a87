// The heavy operations on a host's cores, as XLA calls them: one file to compile.

#include "attention.h"
#include "experts.h"
#include "products.h"
#include "router.h"
