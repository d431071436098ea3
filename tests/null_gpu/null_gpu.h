// What the null GPU was asked to do; test only.
#pragma once

struct null_gpu_counts {
  long launches;            // one by one
  long graph_launches;      // of whole graphs
  long launches_in_graphs;  // the nodes of the latter
  long changed_launches;    // of graphs that had been made before
  long graphs;              // that there are
  long waits;               // of the host for the GPU
};

extern struct null_gpu_counts null_gpu_counts;
// What it refuses, where not 0.
extern int null_gpu_refuses_graphs, null_gpu_refuses_changes;
