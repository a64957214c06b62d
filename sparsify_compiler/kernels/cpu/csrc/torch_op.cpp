// The ops of `sparsify` for PyTorch without Python: those that exported programs call, on the CPU, on the same kernels.
//
// They have the schemas of the ops that Python registers in kernels/. In a process with both, Python's are the ones that
// run: an op that Python has registered is left alone, and one of this library gives way. The entry of an op in
// PyTorch's table stays then, so packages that were loaded before call the op that is there now.

#include <algorithm>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include "interface.h"
#include "problem.h"

namespace {

using at::ScalarType;
using at::Tensor;
using Optional = std::optional<Tensor>;
using Pair = std::tuple<Tensor, Tensor>;

// ---- Tensors as the kernels take them ----------------------------------------------------------------------

// A tensor [B|1, H|1, N] or [B|1, H|1, N, D]. A batch or head dimension of size 1 gets stride 0.
View view(const Tensor& t) {
  return {t.data_ptr(), t.size(0) == 1 ? 0 : t.stride(0), t.size(1) == 1 ? 0 : t.stride(1), t.stride(2)};
}

// The operands of one call, with the copies that a kernel reads, which live as long as this does.
class Operands {
 public:
  // With rows that are dense in memory.
  View rows(const Tensor& t) { return keep(t.stride(-1) == 1 ? t : t.contiguous()); }
  View whole(const Tensor& t) { return keep(t.contiguous()); }
  View whole(const Optional& t) { return t ? whole(*t) : View{}; }
  View bias(const Optional& t) { return t ? whole(t->to(ScalarType::Float)) : View{}; }
  View matrices(const Optional& t) { return t ? keep(t->contiguous().flatten(3)) : View{}; }

 private:
  View keep(const Tensor& t) {
    kept_.push_back(t);
    return view(t);
  }

  std::deque<Tensor> kept_;
};

int32_t dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Half: return kFloat16;
    case ScalarType::BFloat16: return kBFloat16;
    default: TORCH_CHECK(false, "sparsify: tensors must be Float, Half or BFloat16, got ", t.scalar_type());
  }
}

constexpr int64_t kAny = -1;

// Checks an operand. Where `shared`, its first two sizes may also be 1.
void expect(const char* name, const Tensor& t, ScalarType type, std::initializer_list<int64_t> sizes,
            bool shared = false) {
  bool fits = t.device().is_cpu() && t.scalar_type() == type && t.dim() == int64_t(sizes.size());
  int64_t place = 0;
  for (int64_t size : sizes) {
    fits = fits && (size == kAny ? t.size(place) > 0 : t.size(place) == size || (shared && place < 2 && t.size(place) == 1));
    ++place;
  }
  TORCH_CHECK(fits, "sparsify: ", name, " must be ", type, " ", at::IntArrayRef(sizes), " on the CPU (-1: any size",
              shared ? "; the first two may be 1" : "", "), got ", t.scalar_type(), " ", t.sizes(), " on ", t.device());
}

void expect(const char* name, const Optional& t, ScalarType type, std::initializer_list<int64_t> sizes,
            bool shared = false) {
  if (t) expect(name, *t, type, sizes, shared);
}

void expect_bias(const Optional& bias, int64_t batch, int64_t heads, int64_t tokens) {
  if (!bias) return;
  TORCH_CHECK(bias->is_floating_point(), "sparsify: key_bias must be a float tensor, got ", bias->scalar_type());
  expect("key_bias", *bias, bias->scalar_type(), {batch, heads, tokens}, true);
}

void expect_four(const char* name, const Tensor& t) {
  TORCH_CHECK(t.dim() == 4, "sparsify: ", name, " must have 4 dimensions, got ", t.sizes());
}

void expect_groups(int64_t heads, int64_t kv_heads) {
  TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "sparsify: heads must be a multiple of key heads, got ", heads,
              " and ", kv_heads);
}

void expect_provider(const std::string& provider) {
  TORCH_CHECK(provider == "cpu", "sparsify: this library has the provider 'cpu' alone, and the program was exported for '",
              provider, "': export the model in float32, float16 or bfloat16 with provider='cpu'");
}

void expect_indices(bool fit) {
  TORCH_CHECK(fit, "sparsify: an index of a table lies outside the tensor that it indexes");
}

// ---- Attention and the far field ---------------------------------------------------------------------------

struct Table {
  const Tensor &q_bounds, &kv_bounds, &kv_num_blocks, &kv_indices;
  const Optional &q_order, &kv_order;
};

Problem problem_of(Operands& own, const Tensor& query, const Tensor& key, const Tensor& value, const Table& table,
                   const Optional& key_bias, double scale) {
  expect_four("query", query), expect_four("key", key), expect_four("value", value);
  expect_four("kv_indices", table.kv_indices);
  const auto type = query.scalar_type();
  const int64_t batch = query.size(0), heads = query.size(1), kv_heads = key.size(1);
  const int64_t queries = query.size(2), keys = key.size(2), blocks = table.kv_indices.size(2);
  expect("key", key, type, {batch, kv_heads, keys, query.size(3)});
  expect("value", value, type, {batch, kv_heads, keys, value.size(3)});
  expect_groups(heads, kv_heads);
  expect("kv_indices", table.kv_indices, ScalarType::Int, {batch, heads, blocks, table.kv_indices.size(3)}, true);
  expect("q_bounds", table.q_bounds, ScalarType::Int, {batch, heads, blocks + 1}, true);
  expect("kv_bounds", table.kv_bounds, ScalarType::Int, {batch, heads, kAny}, true);
  expect("kv_num_blocks", table.kv_num_blocks, ScalarType::Int, {batch, heads, blocks}, true);
  expect("q_order", table.q_order, ScalarType::Int, {batch, heads, queries}, true);
  expect("kv_order", table.kv_order, ScalarType::Int, {batch, heads, keys}, true);
  expect_bias(key_bias, batch, heads, keys);
  Problem p{};
  p.query = own.rows(query), p.key = own.rows(key), p.value = own.rows(value), p.key_bias = own.bias(key_bias);
  p.q_bounds = own.whole(table.q_bounds), p.kv_bounds = own.whole(table.kv_bounds);
  p.kv_num_blocks = own.whole(table.kv_num_blocks), p.kv_indices = own.whole(table.kv_indices);
  p.q_order = own.whole(table.q_order), p.kv_order = own.whole(table.kv_order);
  p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.q_tokens = queries, p.kv_tokens = keys;
  p.q_blocks = blocks, p.kv_blocks = table.kv_bounds.size(2) - 1, p.width = table.kv_indices.size(3);
  p.head_dim = query.size(3), p.value_dim = value.size(3);
  p.scale = float(scale), p.dtype = dtype_of(query), p.threads = at::get_num_threads();
  return p;
}

// (out [B, H, S, Dv], laid out in memory as [B, S, H, Dv], and lse [B, H, S]).
Pair empty_outputs(const Tensor& query, int64_t value_dim) {
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2);
  return {at::empty({batch, tokens, heads, value_dim}, query.options()).transpose(1, 2),
          at::empty({batch, heads, tokens}, query.options().dtype(ScalarType::Float))};
}

Pair attend(Problem& p, const FarField* far, const Tensor& query) {
  Pair found = empty_outputs(query, p.value_dim);
  p.out = view(std::get<0>(found)), p.lse = view(std::get<1>(found));
  expect_indices(sparsify_attention(&p, far));
  return found;
}

Pair block_sparse_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& q_bounds,
                            const Tensor& kv_bounds, const Tensor& kv_num_blocks, const Tensor& kv_indices,
                            const Optional& q_order, const Optional& kv_order, const Optional& key_bias, double scale,
                            std::string provider) {
  expect_provider(provider);
  Operands own;
  const Table table{q_bounds, kv_bounds, kv_num_blocks, kv_indices, q_order, kv_order};
  Problem p = problem_of(own, query, key, value, table, key_bias, scale);
  return attend(p, nullptr, query);
}

void expect_linear_term(const Optional& matrices, const Optional& limits, const Tensor& query, int64_t blocks,
                        int64_t value_dim) {
  const int64_t batch = query.size(0), heads = query.size(1);
  TORCH_CHECK(matrices.has_value() == limits.has_value(), "sparsify: matrices and limits must be given together");
  expect("matrices", matrices, ScalarType::Float, {batch, heads, blocks, query.size(3), value_dim});
  expect("limits", limits, ScalarType::Float, {batch, heads, blocks, value_dim});
}

Pair near_and_far(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& q_bounds,
                  const Tensor& kv_bounds, const Tensor& kv_num_blocks, const Tensor& kv_indices, const Optional& q_order,
                  const Optional& kv_order, const Optional& key_bias, const Tensor& far_key, const Tensor& far_value,
                  const Tensor& far_bias, const Optional& matrices, const Optional& limits, double scale,
                  std::string provider) {
  expect_provider(provider);
  Operands own;
  const Table table{q_bounds, kv_bounds, kv_num_blocks, kv_indices, q_order, kv_order};
  Problem p = problem_of(own, query, key, value, table, key_bias, scale);
  expect_four("far_key", far_key);
  const auto type = query.scalar_type();
  const int64_t groups = far_key.size(1);
  expect_groups(p.heads, groups);
  expect("far_key", far_key, type, {p.batch, groups, p.kv_blocks, p.head_dim});
  expect("far_value", far_value, type, {p.batch, groups, p.kv_blocks, p.value_dim});
  expect("far_bias", far_bias, ScalarType::Float, {p.batch, p.heads, p.kv_blocks});
  expect_linear_term(matrices, limits, query, p.q_blocks, p.value_dim);
  const FarField far{own.rows(far_key), own.rows(far_value), own.whole(far_bias), own.matrices(matrices),
                     own.whole(limits), groups,              p.kv_blocks};
  return attend(p, &far, query);
}

Pair merge_far_field(const Tensor& query, const Tensor& near_out, const Tensor& near_lse, const Tensor& far_out,
                     const Tensor& far_lse, const Optional& matrices, const Optional& limits, const Tensor& q_bounds,
                     const Optional& q_order, double scale, std::string provider) {
  expect_provider(provider);
  expect_four("query", query), expect_four("near_out", near_out);
  const auto type = query.scalar_type();
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2), value_dim = near_out.size(3);
  expect("q_bounds", q_bounds, ScalarType::Int, {batch, heads, kAny}, true);
  const int64_t blocks = q_bounds.size(2) - 1;
  expect("q_order", q_order, ScalarType::Int, {batch, heads, tokens}, true);
  expect("near_out", near_out, type, {batch, heads, tokens, value_dim});
  expect("near_lse", near_lse, ScalarType::Float, {batch, heads, tokens});
  expect("far_out", far_out, type, {batch, heads, tokens, value_dim});
  expect("far_lse", far_lse, ScalarType::Float, {batch, heads, tokens});
  expect_linear_term(matrices, limits, query, blocks, value_dim);
  Operands own;
  Pair found = empty_outputs(query, value_dim);
  Merge p{};
  p.query = own.rows(query), p.near_out = own.rows(near_out), p.near_lse = view(near_lse);
  p.far_out = own.rows(far_out), p.far_lse = view(far_lse);
  p.matrices = own.matrices(matrices), p.limits = own.whole(limits);
  p.q_bounds = own.whole(q_bounds), p.q_order = own.whole(q_order);
  p.out = view(std::get<0>(found)), p.lse = view(std::get<1>(found));
  p.batch = batch, p.heads = heads, p.tokens = tokens, p.q_blocks = blocks;
  p.head_dim = query.size(3), p.value_dim = value_dim;
  p.scale = float(scale), p.dtype = dtype_of(query), p.threads = at::get_num_threads();
  expect_indices(sparsify_merge_far_field(&p));
  return found;
}

// ---- Statistics of blocks ----------------------------------------------------------------------------------

Statistics statistics_of(Operands& own, const Tensor& key, const Optional& value, const Tensor& bounds,
                         const Optional& order, const Optional& key_bias, int64_t heads) {
  const int64_t batch = key.size(0), kv_heads = key.size(1), tokens = key.size(2);
  expect_groups(heads, kv_heads);
  expect("bounds", bounds, ScalarType::Int, {batch, heads, kAny}, true);
  expect("order", order, ScalarType::Int, {batch, heads, tokens}, true);
  expect_bias(key_bias, batch, heads, tokens);
  Statistics p{};
  p.key = own.rows(key), p.value = value ? own.rows(*value) : View{};
  p.bounds = own.whole(bounds), p.order = own.whole(order), p.key_bias = own.bias(key_bias);
  p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.tokens = tokens, p.blocks = bounds.size(2) - 1;
  p.head_dim = key.size(3), p.value_dim = value ? value->size(3) : 0;
  p.dtype = dtype_of(key), p.threads = at::get_num_threads();
  return p;
}

Pair block_means(const Tensor& tokens, const Tensor& bounds, const Optional& order, std::string provider) {
  expect_provider(provider);
  expect_four("tokens", tokens);
  Operands own;
  Statistics p = statistics_of(own, tokens, std::nullopt, bounds, order, std::nullopt, tokens.size(1));
  const auto options = tokens.options().dtype(ScalarType::Float);
  const Tensor mean = at::empty({p.batch, p.heads, p.blocks, p.head_dim}, options);
  const Tensor mean_square = at::empty(mean.sizes(), options);
  p.key_mean = view(mean), p.key_mean_square = view(mean_square);
  expect_indices(sparsify_block_statistics(&p));
  return {mean, mean_square};
}

// The number of heads with their own blocks or weights; the heads of `key` if all are shared.
int64_t heads_of(const Tensor& key, const Tensor& bounds, const Optional& order, const Optional& key_bias) {
  for (const Tensor& t : {bounds, order.value_or(Tensor()), key_bias.value_or(Tensor())}) {
    if (t.defined() && t.dim() == 3 && t.size(1) != 1) return t.size(1);
  }
  return key.size(1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> block_statistics(
    const Tensor& key, const Tensor& value, const Tensor& bounds, const Optional& order, const Optional& key_bias,
    bool covariance, std::string provider) {
  expect_provider(provider);
  expect_four("key", key), expect_four("value", value);
  expect("value", value, key.scalar_type(), {key.size(0), key.size(1), key.size(2), value.size(3)});
  Operands own;
  Statistics p = statistics_of(own, key, value, bounds, order, key_bias, heads_of(key, bounds, order, key_bias));
  const auto options = key.options().dtype(ScalarType::Float);
  const auto empty = [&](std::vector<int64_t> sizes) { return at::empty(sizes, options); };
  const auto moment = [&](std::vector<int64_t> sizes) { return empty(covariance ? sizes : std::vector<int64_t>{0}); };
  const Tensor log_weight = empty({p.batch, p.heads, p.blocks});
  const Tensor key_mean = empty({p.batch, p.heads, p.blocks, p.head_dim});
  const Tensor value_mean = empty({p.batch, p.heads, p.blocks, p.value_dim});
  const Tensor key_variance = moment({p.batch, p.heads, p.blocks, p.head_dim});
  const Tensor value_variance = moment({p.batch, p.heads, p.blocks, p.value_dim});
  const Tensor cross = moment({p.batch, p.heads, p.blocks, p.head_dim, p.value_dim});
  p.log_weight = view(log_weight), p.key_mean = view(key_mean), p.value_mean = view(value_mean);
  if (covariance) {
    p.key_variance = view(key_variance), p.value_variance = view(value_variance);
    p.covariance = view(cross.flatten(3));
  }
  expect_indices(sparsify_block_statistics(&p));
  return {log_weight, key_mean, value_mean, key_variance, value_variance, cross};
}

// ---- Clusters and predicted keys ---------------------------------------------------------------------------

// Refuses tokens that are none of `tokens`.
void expect_tokens(const Tensor& start, int64_t tokens) {
  const Tensor whole = start.contiguous();
  const auto* token = static_cast<const int64_t*>(whole.data_ptr());
  const bool fit = std::all_of(token, token + whole.numel(), [&](int64_t t) { return t >= 0 && t < tokens; });
  TORCH_CHECK_INDEX(fit, "sparsify: index out of range: start must lie in 0..", tokens - 1);
}

Pair kmeans(const Tensor& points, const Tensor& centroids, const Tensor& start, const Tensor& warm, int64_t first,
            int64_t later, std::string provider) {
  expect_provider(provider);
  expect_four("points", points), expect_four("centroids", centroids);
  const int64_t batch = points.size(0), heads = points.size(1), tokens = points.size(2);
  const int64_t clusters = centroids.size(2), head_dim = points.size(3);
  expect("points", points, points.scalar_type(), {batch, heads, kAny, head_dim});
  expect("centroids", centroids, ScalarType::Float, {batch, heads, kAny, head_dim});
  expect("start", start, ScalarType::Long, {clusters});
  expect("warm", warm, ScalarType::Bool, {});
  TORCH_CHECK(first > 0 && later > 0, "sparsify: kmeans needs at least 1 iteration, got ", first, " and ", later);
  const bool is_warm = warm.item<bool>();
  if (!is_warm) expect_tokens(start, tokens);
  const Tensor means = at::empty(centroids.sizes(), centroids.options());
  const Tensor labels = at::empty({batch, heads, tokens}, points.options().dtype(ScalarType::Int));
  Operands own;
  KMeans p{};
  p.points = own.rows(points), p.centroids = view(means), p.labels = view(labels);
  (is_warm ? p.from : p.start) = own.whole(is_warm ? centroids : start.view({1, 1, -1}));
  p.batch = batch, p.heads = heads, p.tokens = tokens, p.clusters = clusters, p.head_dim = head_dim;
  p.iterations = int32_t(is_warm ? later : first), p.dtype = dtype_of(points), p.threads = at::get_num_threads();
  sparsify_kmeans(&p);
  return {means, labels};
}

Pair sort_by_label(const Tensor& labels, int64_t clusters, std::string provider) {
  expect_provider(provider);
  TORCH_CHECK(labels.dim() == 3, "sparsify: labels must have 3 dimensions, got ", labels.sizes());
  TORCH_CHECK(clusters > 0, "sparsify: clusters must be at least 1, got ", clusters);
  const int64_t batch = labels.size(0), heads = labels.size(1), tokens = labels.size(2);
  expect("labels", labels, ScalarType::Int, {batch, heads, tokens});
  const Tensor order = at::empty({batch, heads, tokens}, labels.options());
  const Tensor bounds = at::empty({batch, heads, clusters + 1}, labels.options());
  Sort p{view(labels), view(order), view(bounds), batch, heads, tokens, clusters, at::get_num_threads()};
  expect_indices(sparsify_sort_by_label(&p));
  return {order, bounds};
}

std::tuple<Tensor, Tensor, Tensor> top_p_blocks(const Tensor& q_centroids, const Tensor& kv_centroids,
                                                const Tensor& kv_sizes, double scale, double top_p, int64_t min_blocks,
                                                std::string provider) {
  expect_provider(provider);
  expect_four("q_centroids", q_centroids), expect_four("kv_centroids", kv_centroids);
  const int64_t batch = q_centroids.size(0), heads = q_centroids.size(1), rows = q_centroids.size(2);
  const int64_t kv_heads = kv_centroids.size(1), clusters = kv_centroids.size(2), head_dim = q_centroids.size(3);
  expect("q_centroids", q_centroids, ScalarType::Float, {batch, heads, rows, head_dim});
  expect("kv_centroids", kv_centroids, ScalarType::Float, {batch, kv_heads, kAny, head_dim});
  expect_groups(heads, kv_heads);
  expect("kv_sizes", kv_sizes, ScalarType::Int, {batch, kv_heads, clusters}, true);
  TORCH_CHECK(top_p >= 0 && min_blocks >= 0, "sparsify: top_p and min_blocks must be at least 0, got ", top_p, " and ",
              min_blocks);
  const auto integers = q_centroids.options().dtype(ScalarType::Int);
  const Tensor counts = at::empty({batch, heads, rows}, integers);
  const Tensor indices = at::empty({batch, heads, rows, clusters}, integers);
  const Tensor kept = at::empty({batch, heads, rows}, q_centroids.options());
  Operands own;
  TopP p{};
  p.q_centroids = own.rows(q_centroids), p.kv_centroids = own.rows(kv_centroids), p.kv_sizes = own.whole(kv_sizes);
  p.kv_num_blocks = view(counts), p.kv_indices = view(indices), p.kept = view(kept);
  p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.rows = rows, p.clusters = clusters, p.head_dim = head_dim;
  p.floor = top_p >= 1 ? clusters : std::min(min_blocks, clusters);
  p.top_p = top_p, p.scale = float(scale), p.threads = at::get_num_threads();
  sparsify_top_p_blocks(&p);
  return {counts, indices, kept};
}

Pair top_k_keys(const Tensor& query, const Tensor& key, const Tensor& budget, const Optional& q_bounds,
                const Optional& key_bias, int64_t width, double scale, std::string provider) {
  expect_provider(provider);
  expect_four("query", query), expect_four("key", key);
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), rank = query.size(3);
  const int64_t kv_heads = key.size(1), tokens = key.size(2);
  expect("query", query, query.scalar_type(), {batch, heads, queries, kAny});
  expect("key", key, query.scalar_type(), {batch, kv_heads, kAny, rank});
  expect_groups(heads, kv_heads);
  expect("budget", budget, ScalarType::Int, {batch, heads}, true);
  expect("q_bounds", q_bounds, ScalarType::Int, {kAny});
  expect_bias(key_bias, batch, heads, tokens);
  TORCH_CHECK(width > 0, "sparsify: width must be at least 1, got ", width);
  const int64_t groups = q_bounds ? q_bounds->size(0) - 1 : queries;
  const auto integers = query.options().dtype(ScalarType::Int);
  const Tensor counts = at::empty({batch, heads, groups}, integers);
  const Tensor indices = at::empty({batch, heads, groups, width}, integers);
  Operands own;
  TopK p{};
  p.query = own.rows(query), p.key = own.rows(key), p.budget = own.whole(budget.unsqueeze(2));
  p.q_bounds = q_bounds ? own.whole(q_bounds->view({1, 1, -1})) : View{}, p.key_bias = own.bias(key_bias);
  p.kv_num_blocks = view(counts), p.kv_indices = view(indices);
  p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.queries = queries, p.groups = groups;
  p.tokens = tokens, p.rank = rank, p.width = width;
  p.scale = float(scale), p.dtype = dtype_of(query), p.threads = at::get_num_threads();
  expect_indices(sparsify_top_k_keys(&p));
  return {counts, indices};
}

Tensor lay_out(const Tensor& tensor, at::IntArrayRef strides) {
  return at::empty_strided(tensor.sizes(), strides, tensor.options()).copy_(tensor);
}

// ---- Registration ------------------------------------------------------------------------------------------

class Ops {
 public:
  Ops() {
    add("block_sparse_attention",
        "(Tensor query, Tensor key, Tensor value, Tensor q_bounds, Tensor kv_bounds, Tensor kv_num_blocks, "
        "Tensor kv_indices, Tensor? q_order, Tensor? kv_order, Tensor? key_bias, float scale, str provider) -> "
        "(Tensor, Tensor)",
        TORCH_FN(block_sparse_attention));
    add("near_and_far",
        "(Tensor query, Tensor key, Tensor value, Tensor q_bounds, Tensor kv_bounds, Tensor kv_num_blocks, "
        "Tensor kv_indices, Tensor? q_order, Tensor? kv_order, Tensor? key_bias, Tensor far_key, Tensor far_value, "
        "Tensor far_bias, Tensor? matrices, Tensor? limits, float scale, str provider) -> (Tensor, Tensor)",
        TORCH_FN(near_and_far));
    add("merge_far_field",
        "(Tensor query, Tensor near_out, Tensor near_lse, Tensor far_out, Tensor far_lse, Tensor? matrices, "
        "Tensor? limits, Tensor q_bounds, Tensor? q_order, float scale, str provider) -> (Tensor, Tensor)",
        TORCH_FN(merge_far_field));
    add("block_means", "(Tensor tokens, Tensor bounds, Tensor? order, str provider) -> (Tensor, Tensor)",
        TORCH_FN(block_means));
    add("block_statistics",
        "(Tensor key, Tensor value, Tensor bounds, Tensor? order, Tensor? key_bias, bool covariance, str provider) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        TORCH_FN(block_statistics));
    add("kmeans",
        "(Tensor points, Tensor centroids, Tensor start, Tensor warm, SymInt first, SymInt later, str provider) -> "
        "(Tensor, Tensor)",
        TORCH_FN(kmeans));
    add("sort_by_label", "(Tensor labels, SymInt clusters, str provider) -> (Tensor, Tensor)", TORCH_FN(sort_by_label));
    add("top_p_blocks",
        "(Tensor q_centroids, Tensor kv_centroids, Tensor kv_sizes, float scale, float top_p, SymInt min_blocks, "
        "str provider) -> (Tensor, Tensor, Tensor)",
        TORCH_FN(top_p_blocks));
    add("top_k_keys",
        "(Tensor query, Tensor key, Tensor budget, Tensor? q_bounds, Tensor? key_bias, SymInt width, float scale, "
        "str provider) -> (Tensor, Tensor)",
        TORCH_FN(top_k_keys));
    add("lay_out", "(Tensor tensor, SymInt[] strides) -> Tensor", TORCH_FN(lay_out));
    if (!exists("give_way")) entries_.def("give_way(str op) -> ()", [this](const std::string& op) { ops_.erase(op); });
  }

 private:
  template <class Function>
  void add(const char* name, const char* schema, Function function) {
    if (exists(name)) return;
    // A kernel of a backend that nobody uses keeps the entry when the op gives way.
    entries_.impl(name, torch::dispatch(c10::DispatchKey::PrivateUse3, torch::CppFunction::makeFallthrough()));
    auto op = fragment();
    op->def((std::string(name) + schema).c_str());
    op->impl(name, torch::dispatch(c10::DispatchKey::CPU, function));
    ops_[name] = std::move(op);
  }

  static bool exists(const char* name) {
    return c10::Dispatcher::singleton().findSchema({std::string("sparsify::") + name, ""}).has_value();
  }

  static std::unique_ptr<torch::Library> fragment() {
    return std::make_unique<torch::Library>(torch::Library::FRAGMENT, "sparsify", std::nullopt, __FILE__, __LINE__);
  }

  torch::Library entries_{torch::Library::FRAGMENT, "sparsify", std::nullopt, __FILE__, __LINE__};
  std::map<std::string, std::unique_ptr<torch::Library>> ops_;
};

Ops ops;

}  // namespace
