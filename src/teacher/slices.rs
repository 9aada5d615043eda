//! A rank's slices of the weights, handed out under the names and in the shapes that its layers ask for. Only their bytes
//! are read. Which slices they are is declared in `models/llama4/sharding.rs`.

use std::ops::Range;

use limbeck_kernels::packed_matmul::Numbers;

use crate::{
    error::Result,
    models::{
        DecoderConfig, WeightSource,
        llama4::sharding::{self, Cut},
        parameter::{Runs, Spare, Stored},
    },
    parallel::{Axis, Mesh, Place},
};

/// The weights of a model as the layers of one rank see them.
pub(super) struct Slices<'a> {
    /// The whole model's weights.
    pub source: &'a dyn WeightSource,
    /// The whole model's configuration.
    pub config: &'a DecoderConfig,
    pub mesh: Mesh,
    pub place: Place,
}

impl Slices<'_> {
    /// The cut that changes a tensor's shape. Experts are asked for by their numbers in the whole model.
    fn cut(&self, name: &str) -> Option<Cut> {
        let cuts = sharding::cuts(name).iter().copied();
        cuts.into_iter().find(|cut| cut.mesh != Axis::Expert && self.mesh.along(cut.mesh) > 1)
    }

    /// Some rows, of those that the rank has, of a tensor whose shape is `shape` on this rank.
    fn rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Stored> {
        let Some(cut) = self.cut(name) else { return self.source.stored_rows(name, shape, rows) };
        let (length, own) = sharding::ranges(cut.unit, self.config, layer_of(name), &self.mesh, self.place);
        let mut whole = shape.to_vec();
        whole[cut.tensor] = length;
        if cut.tensor > 0 {
            let inner: usize = whole[cut.tensor + 1..].iter().product();
            let runs = Runs {
                repeats: whole[1..cut.tensor].iter().product(),
                stride: length * inner,
                ranges: own.into_iter().map(|range| range.start * inner..range.end * inner).collect(),
            };
            return self.source.stored_runs(name, &whole, rows, &runs);
        }
        let mut found: Option<Stored> = None;
        let mut first = 0;
        for range in own {
            let wanted = rows.start.clamp(first, first + range.len())..rows.end.clamp(first, first + range.len());
            let stored = wanted.start + range.start - first..wanted.end + range.start - first;
            first += range.len();
            if stored.is_empty() {
                continue;
            }
            let stored = self.source.stored_rows(name, &whole, stored)?;
            found = Some(match found {
                None => stored,
                Some(before) => before.followed_by(stored),
            });
        }
        Ok(found.unwrap_or(Stored::Values(vec![])))
    }
}

impl WeightSource for Slices<'_> {
    fn numbers(&self) -> Numbers {
        self.source.numbers()
    }

    fn load(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.load_rows(name, shape, 0..shape[0])
    }

    fn load_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Vec<f32>> {
        match self.cut(name) {
            None => self.source.load_rows(name, shape, rows),
            Some(_) => self.rows(name, shape, rows).map(Stored::values),
        }
    }

    fn stored_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Stored> {
        self.rows(name, shape, rows)
    }

    fn spare(&self) -> Option<&Spare> {
        self.source.spare()
    }
}

/// The number of the layer that a weight belongs to.
fn layer_of(name: &str) -> Option<usize> {
    name.split_once("model.layers.")?.1.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::models::llama4::{Llama4Config, shapes};

    /// A tensor of consecutive numbers, whatever its name.
    struct Counting;

    impl WeightSource for Counting {
        fn load(&self, _: &str, shape: &[usize]) -> Result<Vec<f32>> {
            Ok((0..shape.iter().product::<usize>()).map(|number| number as f32).collect())
        }

        fn load_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Vec<f32>> {
            let width: usize = shape[1..].iter().product();
            Ok(self.load(name, shape)?[rows.start * width..rows.end * width].to_vec())
        }
    }

    #[test]
    fn each_axis_is_cut_where_it_is_declared() {
        let config = Llama4Config {
            hidden_size: 3,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 2,
            intermediate_size: 4,
            num_local_experts: 2,
            num_hidden_layers: 1,
            moe_layers: vec![0],
            rotary_layers: vec![true],
            ..shapes::tiny()
        };
        let config = config.decoder(Path::new("test")).unwrap();
        let mesh = Mesh { tensor: 2, expert: 2, ..Mesh::default() };
        let place = Place { tensor: 1, expert: 1, ..Place::default() };
        let slices = Slices { source: &Counting, config: &config, mesh, place };
        let layer = |name: &str| format!("model.layers.0.{name}");
        let numbers = |name: &str, shape: &[usize], rows| slices.stored_rows(name, shape, rows).unwrap().values();

        // [8, 3] by rows, [4, 3] by rows, [3, 8] by columns.
        assert_eq!(numbers(&layer("self_attn.q_proj.weight"), &[4, 3], 1..3), [15., 16., 17., 18., 19., 20.]);
        assert_eq!(numbers(&layer("self_attn.k_proj.weight"), &[2, 3], 0..1), [6., 7., 8.]);
        assert_eq!(numbers(&layer("self_attn.o_proj.weight"), &[3, 4], 2..3), [20., 21., 22., 23.]);
        // [2, 3, 8], both halves of each row; [2, 4, 3], half of the rows of an expert.
        let gate_up = numbers(&layer("feed_forward.experts.gate_up_proj"), &[2, 3, 4], 1..2);
        assert_eq!(gate_up, [26., 27., 30., 31., 34., 35., 38., 39., 42., 43., 46., 47.]);
        assert_eq!(numbers(&layer("feed_forward.experts.down_proj"), &[2, 2, 3], 1..2), [18., 19., 20., 21., 22., 23.]);
        // Norms are whole.
        assert_eq!(slices.load(&layer("input_layernorm.weight"), &[3]).unwrap(), [0., 1., 2.]);
        // More ranks than key heads: two ranks have the same one.
        let mesh = Mesh { tensor: 4, ..Mesh::default() };
        for (tensor, first) in [(0, 0.0), (1, 0.0), (2, 6.0), (3, 6.0)] {
            let slices = Slices { mesh, place: Place { tensor, ..Place::default() }, ..slices };
            let key = slices.load(&layer("self_attn.v_proj.weight"), &[2, 3]).unwrap();
            assert_eq!(key, (0..6).map(|number| first + number as f32).collect::<Vec<_>>());
        }
    }
}
