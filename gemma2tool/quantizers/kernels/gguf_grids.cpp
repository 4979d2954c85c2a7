#include "gguf_grids.hpp"

#include <algorithm>
#include <cstdlib>
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

// The lists while they are built.
struct Lists {
    std::vector<NeighbourLists::List> lists;
    std::vector<uint16_t> codes, points;

    void add(const Grid& grid, const std::vector<int>& list) {
        lists.push_back({(int32_t)points.size(), (int32_t)list.size()});
        for (size_t i = 0; i < (list.size() + 15) / 16 * 16; ++i) {
            const int point = list[i < list.size() ? i : 0];
            points.push_back((uint16_t)point);
            codes.push_back(grid.codes[point]);
        }
    }
    NeighbourLists kept() const { return {keep(lists), keep(codes), keep(points)}; }
};

// Whether `a` is nearer to `from` than `b` in every coordinate in which they differ.
bool dominates(const uint8_t* a, const uint8_t* b, const int* from, int dims) {
    for (int i = 0; i < dims; ++i)
        if (a[i] != b[i] && std::abs(a[i] - from[i]) >= std::abs(b[i] - from[i])) return false;
    return true;
}

std::vector<int> without_dominated(const Grid& grid, const std::vector<int>& list, const int* from) {
    std::vector<int> kept;
    for (int point : list) {
        const auto is_dominating = [&](int other) {
            return dominates(grid.points[other], grid.points[point], from, grid.dims);
        };
        if (std::none_of(kept.begin(), kept.end(), is_dominating)) kept.push_back(point);
    }
    return kept;
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
    std::vector<bool> on(index.size(), false);
    g.codes = new uint16_t[size];
    for (int j = 0; j < size; ++j) {
        int u = 0;
        for (int i = 0; i < g.dims; ++i) u |= g.points[j][i] << (g.bits * i);
        g.codes[j] = (uint16_t)u;
        index[u] = j;
        on[u] = true;
    }
    Lists all, undominated;
    int total = 1;
    for (int i = 0; i < g.dims; ++i) total *= levels;
    for (int n = 0; n < total; ++n) {
        int from[8], u = 0;
        for (int i = 0, rest = n; i < g.dims; ++i, rest /= levels) {
            from[i] = rest % levels;
            u |= from[i] << (g.bits * i);
        }
        if (on[u]) continue;
        index[u] = -1 - (int32_t)all.lists.size();
        const std::vector<int> near = neighbours(g, from, distances);
        all.add(g, near);
        undominated.add(g, without_dominated(g, near, from));
    }
    g.index = keep(index);
    g.neighbours = all.kept();
    g.undominated = undominated.kept();
    grid = g;
}
