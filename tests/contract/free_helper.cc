// SPDX-License-Identifier: Apache-2.0
//
// The process that frees a deleted file's blocks, as drover's main() has it.
#include "blockcopy/image_file.h"

int main(int argc, char** argv) { return drover::blockcopy::run_free_command({argv + 1, argv + argc}); }
