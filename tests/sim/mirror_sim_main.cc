// SPDX-License-Identifier: Apache-2.0
//
// mirror_sim: runs seeds of the mirror's simulation, on all cores, or replays one.
//
//   mirror_sim --count 1000000            a million seeds
//   mirror_sim --seed 4711 --trace        that one, step by step
#include "tests/sim/mirror_sim.h"
#include "tests/sim/seeds_main.h"

int main(int argc, char** argv) {
  using namespace drover::sim;
  return run_seeds<MirrorSimOptions, MirrorSimStats>(
      argc, argv,
      {.program = "mirror_sim",
       .purpose = "Simulates one disk's mirror under every interleaving that the seeds bring.",
       .run = run_mirror_sim,
       .tell = [](const MirrorSimStats& total) {
         return fmt::format(
             "{} steps, {} guest writes, {} forwarded, {} copies, {} answered at the bound, {} "
             "lanes "
             "lost, {} runners killed, {} targets restarted, {} bitmaps replaced, {} chunks found "
             "damaged, {} offers ({} not found in full)",
             total.steps, total.guest_writes, total.forwarded, total.copies, total.expired,
             total.lanes_lost, total.crashes, total.restarts, total.rotations, total.damaged, total.offers,
             total.not_found);
       }});
}
