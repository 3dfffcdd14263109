//! A kernel's parameters where these are one struct, laid out as C++ does.

use tch::Tensor;

use super::super::driver::TileMap;

#[derive(Default)]
pub struct Params(Vec<u8>);

impl Params {
    fn bytes<const N: usize>(mut self, bytes: [u8; N]) -> Self {
        self.0.resize(self.0.len().next_multiple_of(N), 0);
        self.0.extend(bytes);
        self
    }
    pub fn i32(self, x: i64) -> Self {
        self.bytes((x as i32).to_le_bytes())
    }
    pub fn f32(self, x: f64) -> Self {
        self.bytes((x as f32).to_le_bytes())
    }
    pub fn pointer(self, x: Option<&Tensor>) -> Self {
        self.bytes(x.map_or(0, |x| x.data_ptr() as u64).to_le_bytes())
    }
    /// `struct Input`, `struct Decays`, `struct Output`: an address and three strides.
    pub fn strided(self, x: Option<&Tensor>) -> Self {
        let strides = x.map_or(vec![0; 3], Tensor::stride);
        strides[..3].iter().fold(self.pointer(x), |params, stride| params.bytes(stride.to_le_bytes()))
    }
    /// First in their struct, which is then aligned to 64 bytes.
    pub fn map(mut self, map: &TileMap) -> Self {
        for word in map.0 {
            self.0.extend(word.to_le_bytes());
        }
        self
    }
    pub fn words(mut self) -> Vec<u64> {
        self.0.resize(self.0.len().next_multiple_of(64), 0);
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| (word << 8) | u64::from(*byte));
        self.0.chunks_exact(8).map(word).collect()
    }
}
