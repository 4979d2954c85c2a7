// The grids of the IQ1, IQ2 and IQ3 types: sets of points, and the nearest grid points of every point that is not on a
// grid.
//
// The points are data of the GGUF format and come from Python; the neighbor lists are those of ggml, computed once.
#pragma once

#include <stdint.h>

// Lists of points, by number.
struct NeighbourLists {
    struct List {
        int32_t start, size;
    };
    List* lists;
    // of entry i of a list, at start + i; up to a multiple of 16 the first entry repeats
    uint16_t* codes;
    uint16_t* points;
};

struct Grid {
    int size, dims, bits;  // points, coordinates per point, bits per coordinate in a code
    uint8_t (*points)[8];  // the coordinates, 0..2 or 0..7
    int8_t (*values)[8];   // their values in a file
    int32_t* index;  // by code (the coordinates in `bits` each, the first lowest): its point, or -1 - the number of
                     // its lists
    uint16_t* codes;  // of the points
    NeighbourLists neighbours;
    // The same without the neighbors that an earlier one dominates: it is nearer to the code in every coordinate in
    // which they differ.
    NeighbourLists undominated;
};

enum GridName { GRID_IQ2_XXS, GRID_IQ2_XS, GRID_IQ2_S, GRID_IQ1, GRID_IQ3_XXS, GRID_IQ3_S, GRIDS };

extern Grid gguf_grids[GRIDS];

// points: size x dims coordinates. Must not be called while kernels of the grid's types run.
void set_gguf_grid(GridName name, const uint8_t* points, int size);
