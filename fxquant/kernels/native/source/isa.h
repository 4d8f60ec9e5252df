// The instruction set that this library is compiled for: one header each, of one small vocabulary, which isa_plain.h explains.
// Everything else is written in that vocabulary, and gives the same bits with each of them.
#pragma once
#ifndef FXQUANT_ISA_HEADER
#define FXQUANT_ISA_HEADER "isa_plain.h"
#endif
#include FXQUANT_ISA_HEADER
