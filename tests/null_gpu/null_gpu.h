// What the null GPU was asked to do; test only.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct null_gpu_counts {
  long launches;            // one by one
  long graph_launches;      // of whole graphs
  long launches_in_graphs;  // the nodes of the latter
  long changed_launches;    // of graphs that had been made before
  long graphs;              // that there are
  long waits;               // of the host for the GPU
  long unordered_nodes;     // of graphs, that do not follow the one before them alone
};

extern struct null_gpu_counts null_gpu_counts;
// What it refuses, where not 0.
extern int null_gpu_refuses_graphs, null_gpu_refuses_changes;

// What it was told of the latest launch: one by one, or as a node of a graph that was made or changed.
struct null_gpu_launch {
  uintptr_t kernel;  // 0: zeros
  unsigned blocks[3], threads[3], shared_bytes;
  uintptr_t first_argument;  // of zeros, where they begin
  size_t zero_bytes;
};

extern struct null_gpu_launch null_gpu_latest;
// The stream of the latest launch or graph that it runs.
extern uintptr_t null_gpu_stream;

// A new node of a graph, which is the number of its nodes, behind ``count`` others.
void* null_gpu_add_node(void* graph, void* const* others, size_t count);
