// The part of CUDA that the host functions see; test only.
#pragma once

using cudaStream_t = void*;
