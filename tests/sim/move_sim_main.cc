// SPDX-License-Identifier: Apache-2.0
//
// move_sim: runs seeds of the simulation of a whole move, on all cores, or replays one.
//
//   move_sim --count 1000000            a million seeds
//   move_sim --seed 4711 --trace        that one, step by step
#include "tests/sim/move_sim.h"
#include "tests/sim/seeds_main.h"

int main(int argc, char** argv) {
  using namespace drover::sim;
  return run_seeds<MoveSimOptions, MoveSimStats>(
      argc, argv,
      {.program = "move_sim",
       .purpose = "Simulates whole moves under every interleaving and fault that the seeds bring.",
       .run = run_move_sim,
       .tell = [](const MoveSimStats& total) {
         return fmt::format(
             "{} moved, {} undone, {} held, {} killed, {} resumed, {} kept; {} steps, {} guest "
             "writes (worst {} us), {} faults",
             total.moved, total.undone, total.held, total.killed, total.resumed, total.kept, total.steps,
             total.guest_writes, total.worst_write_us, total.faults);
       }});
}
