#include "gguf_grids.hpp"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

Grid gguf_grids[GRIDS];

namespace {

// The values of the coordinates of each grid.
constexpr int8_t VALUES[GRIDS][8] = {
    {8, 25, 43}, {8, 25, 43}, {8, 25, 43}, {-1, 0, 1}, {4, 12, 20, 28, 36, 44, 52, 62}, {1, 3, 5, 7, 9, 11, 13, 15}};

template <class T>
T* keep(const std::vector<T>& v) {
    T* p = new T[v.size()];
    std::copy(v.begin(), v.end(), p);
    return p;
}

// The points at the `distances` smallest distinct distances from `from`, sorted by distance and number.
std::vector<int> neighbours(const Grid& grid, const int* from, int distances) {
    std::vector<std::pair<int, int>> all(grid.size);
    for (int j = 0; j < grid.size; ++j) {
        int d = 0;
        for (int i = 0; i < grid.dims; ++i) {
            const int step = 2 * (grid.points[j][i] - from[i]);
            d += step * step;
        }
        all[j] = {d, j};
    }
    std::vector<int> found;
    int last = -1;
    for (int n = 0; n < distances; ++n) {
        int next = 1 << 30;
        for (const auto& p : all)
            if (p.first > last) next = std::min(next, p.first);
        if (next == 1 << 30) break;
        for (const auto& p : all)
            if (p.first == next) found.push_back(p.second);
        last = next;
    }
    return found;
}

}  // namespace

void set_gguf_grid(GridName name, const uint8_t* points, int size) {
    Grid& grid = gguf_grids[name];
    if (grid.size) return;
    const bool three = name == GRID_IQ3_XXS || name == GRID_IQ3_S;
    Grid g{};
    g.size = size;
    g.dims = three ? 4 : 8;
    g.bits = three ? 3 : 2;
    const int levels = three ? 8 : 3, distances = name == GRID_IQ1 || name == GRID_IQ3_S ? 3
                                                  : name == GRID_IQ2_S                   ? 1
                                                                                         : 2;
    g.points = new uint8_t[size][8]();
    g.values = new int8_t[size][8]();
    for (int j = 0; j < size; ++j) {
        std::memcpy(g.points[j], points + j * g.dims, g.dims);
        for (int i = 0; i < g.dims; ++i) g.values[j][i] = VALUES[name][g.points[j][i]];
    }

    std::vector<int32_t> index(1 << (g.bits * g.dims), 0);
    std::vector<int32_t> starts{0}, sizes, packed;
    std::vector<uint16_t> list_points;
    std::vector<uint8_t> list_coordinates;
    std::vector<bool> on(index.size(), false);
    for (int j = 0; j < size; ++j) {
        int u = 0;
        for (int i = 0; i < g.dims; ++i) u |= g.points[j][i] << (g.bits * i);
        index[u] = j;
        on[u] = true;
    }
    int total = 1;
    for (int i = 0; i < g.dims; ++i) total *= levels;
    for (int n = 0; n < total; ++n) {
        int from[8], u = 0;
        for (int i = 0, rest = n; i < g.dims; ++i, rest /= levels) {
            from[i] = rest % levels;
            u |= from[i] << (g.bits * i);
        }
        if (on[u]) continue;
        std::vector<int> near = neighbours(g, from, distances);
        sizes.push_back((int32_t)near.size());
        near.resize((near.size() + 15) / 16 * 16, near[0]);
        index[u] = -(int32_t)starts.size();
        for (int i = 0; i < g.dims; ++i)
            for (int j : near) list_coordinates.push_back(g.points[j][i]);
        for (int j : near) {
            const uint8_t* c = g.points[j];
            list_points.push_back((uint16_t)j);
            packed.push_back(c[0] | (c[1] << 8) | (c[2] << 16) | (c[3] << 24));
        }
        starts.push_back((int32_t)list_points.size());
    }
    g.index = keep(index);
    g.list_start = keep(starts);
    g.list_sizes = keep(sizes);
    g.list_packed = keep(packed);
    g.list_points = keep(list_points);
    g.list_coordinates = keep(list_coordinates);
    grid = g;
}
