//! Rotary embedding on a device: one launch each way. Cosines and sines are brought to a device once for each table.

use std::{
    fmt,
    sync::{Arc, Mutex},
};

use burn_cubecl::{CubeDevice, cubecl::server::Handle, tensor::CubeTensor};

use super::{
    cube::rotary as kernels,
    op::{DeviceOp, Spec},
    tensors::{address, buffer, element, empty, threads, upload, vector_size, vectors},
};
use crate::rotary::{Pairing, RotaryTable};

/// A table's cosines and sines on the devices that have asked for them. Shared by a table's clones.
#[derive(Clone, Default)]
pub struct Uploaded(Arc<Mutex<Vec<(CubeDevice, Handle, Handle)>>>);

impl fmt::Debug for Uploaded {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Uploaded")
    }
}

impl Uploaded {
    fn get(&self, table: &RotaryTable, x: &CubeTensor) -> (Handle, Handle) {
        let mut uploaded = self.0.lock().expect("nothing fails while this is held");
        if let Some((_, cosines, sines)) = uploaded.iter().find(|(device, ..)| *device == x.device) {
            return (cosines.clone(), sines.clone());
        }
        let (cosines, sines) = (upload(&x.client, &table.cosines), upload(&x.client, &table.sines));
        uploaded.push((x.device.clone(), cosines.clone(), sines.clone()));
        (cosines, sines)
    }
}

/// Of one operand `[N, heads * head_dim]`.
#[derive(Debug)]
pub struct Rotary {
    pub head_dim: usize,
    pub table: RotaryTable,
}

impl Rotary {
    fn turn(&self, x: &CubeTensor, sign: f32) -> CubeTensor {
        let output = empty(x, x.meta.shape().to_vec(), x.dtype);
        let half = self.head_dim / 2;
        let elements = x.meta.num_elements();
        if elements == 0 {
            return output;
        }
        let [tokens, width] = [0, 1].map(|axis| x.meta.shape()[axis]);
        let heads = width / self.head_dim;
        let (cosines, sines) = self.table.uploaded.get(&self.table, x);
        let angles = tokens * half;
        let element = element(x.dtype).expect("asked for before");
        let places = address(&[x]);
        match self.table.pairing {
            Pairing::Halves => {
                // Angles are f32, of which no device reads more than four at once.
                let vector = vector_size(x, half).min(4);
                let count = elements / 2 / vector;
                let (cubes, dim) = threads(count);
                kernels::turn_halves::launch(
                    &x.client,
                    cubes,
                    dim,
                    places,
                    vector,
                    vectors(x, vector),
                    buffer(&cosines, angles / vector, 4 * vector),
                    buffer(&sines, angles / vector, 4 * vector),
                    vectors(&output, vector),
                    count,
                    heads,
                    half / vector,
                    sign,
                    element,
                );
            }
            Pairing::Interleaved => {
                let vector = vector_size(x, self.head_dim);
                assert!(vector >= 2, "a device that reads two neighbouring elements at once");
                let count = elements / vector;
                let (cubes, dim) = threads(count);
                kernels::turn_neighbours::launch(
                    &x.client,
                    cubes,
                    dim,
                    places,
                    vector,
                    vectors(x, vector),
                    buffer(&cosines, angles, 4),
                    buffer(&sines, angles, 4),
                    vectors(&output, vector),
                    count,
                    heads,
                    half,
                    sign,
                    element,
                );
            }
        }
        output
    }
}

impl DeviceOp for Rotary {
    fn outputs(&self, inputs: &[Spec]) -> Vec<Spec> {
        vec![inputs[0].clone()]
    }

    fn reads_inputs(&self) -> bool {
        false
    }

    fn forward(&self, inputs: &[CubeTensor]) -> (CubeTensor, Vec<CubeTensor>) {
        (self.turn(&inputs[0], 1.0), vec![])
    }

    fn backward(
        &self,
        _: &[CubeTensor],
        _: &[CubeTensor],
        grad: CubeTensor,
        needed: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        // Turning back is the transpose, hence the derivative.
        vec![needed[0].then(|| self.turn(&grad, -1.0))]
    }
}
