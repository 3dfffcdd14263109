//! The slow truth: linear attention as its recurrence over the whole sequence, token by token, in f64 on one process.
//!
//! The backward is the adjoint recurrence, written out; it shares no formula with the chunkwise version.

use tch::{Kind, Tensor};

use super::{Decay, Inputs};
use crate::Result;

/// o `[B, T, H, V]` and the state at the end of each document: `[B, H, K, V]`, or `[N, H, K, V]` when packed.
#[derive(Debug)]
pub struct Outputs {
    pub o: Tensor,
    pub final_state: Tensor,
}

/// Gradients in f64; `dlog_decay` has the shape of the decay, `[H]` included.
#[derive(Debug)]
pub struct OracleGrads {
    pub dq: Tensor,
    pub dk: Tensor,
    pub dv: Tensor,
    pub dlog_decay: Option<Tensor>,
    pub dinitial_state: Tensor,
}

/// A whole sequence. `cu_seqlens` `[N+1]` packs N documents into B = 1; `initial_state` is `[B, H, K, V]`, or
/// `[N, H, K, V]` when packed.
pub struct Whole<'a> {
    pub inputs: &'a Inputs,
    pub cu_seqlens: Option<&'a [i64]>,
    pub initial_state: Option<&'a Tensor>,
    pub causal: bool,
    pub scale: f64,
}

impl Whole<'_> {
    /// Documents as `(first token, end, rows of the states)`.
    fn documents(&self) -> Vec<(i64, i64, i64, i64)> {
        match self.cu_seqlens {
            None => vec![(0, self.inputs.tokens(), 0, self.inputs.q.size()[0])],
            Some(cu) => cu.windows(2).enumerate().map(|(n, w)| (w[0], w[1], n as i64, 1)).collect(),
        }
    }

    fn double(&self) -> Result<(Tensor, Tensor, Tensor, Tensor)> {
        let kind = Kind::Double;
        let (q, k, v) = (&self.inputs.q, &self.inputs.k, &self.inputs.v);
        let (q, k, v) = (q.f_to_kind(kind)?, k.f_to_kind(kind)?, v.f_to_kind(kind)?);
        // [B, T, H, K], whatever the form of the decay.
        let g = match &self.inputs.decay {
            Decay::None => q.f_zeros_like()?,
            Decay::Head(g) => g.f_to_kind(kind)?.f_view([1, 1, -1, 1])?.f_expand(q.size(), false)?,
            Decay::Token(g) => g.f_to_kind(kind)?.f_unsqueeze(-1)?.f_expand(q.size(), false)?,
            Decay::Channel(g) => g.f_to_kind(kind)?,
        };
        Ok((q, k, v, g.f_exp()?))
    }

    fn initial(&self, rows: (i64, i64)) -> Result<Tensor> {
        let ((_, _, h, dk), dv) = (self.inputs.q.size4()?, self.inputs.v.size()[3]);
        Ok(match self.initial_state {
            Some(state) => state.f_narrow(0, rows.0, rows.1)?.f_to_kind(Kind::Double)?,
            None => Tensor::f_zeros([rows.1, h, dk, dv], (Kind::Double, self.inputs.q.device()))?,
        })
    }

    /// The states after every token of one document (causal), or its end state at every token (full).
    fn states(&self, k: &Tensor, v: &Tensor, a: &Tensor, doc: (i64, i64, i64, i64)) -> Result<(Tensor, Vec<Tensor>)> {
        let initial = self.initial((doc.2, doc.3))?;
        let mut m = initial.shallow_clone();
        let mut states = Vec::new();
        for t in doc.0..doc.1 {
            let (k, v, a) = (k.f_select(1, t)?, v.f_select(1, t)?, a.f_select(1, t)?);
            m = m.f_mul(&a.f_unsqueeze(-1)?)?.f_add(&k.f_unsqueeze(-1)?.f_mul(&v.f_unsqueeze(-2)?)?)?;
            states.push(m.shallow_clone());
        }
        if !self.causal {
            states.iter_mut().for_each(|s| *s = m.shallow_clone());
        }
        Ok((initial, states))
    }

    /// `o_s = scale q_s M_s`, with `M_s` the document's end state when not causal.
    pub fn forward(&self) -> Result<Outputs> {
        let (q, k, v, a) = self.double()?;
        let mut o = Vec::new();
        let mut finals = Vec::new();
        for doc in self.documents() {
            let (initial, states) = self.states(&k, &v, &a, doc)?;
            for (t, m) in (doc.0..doc.1).zip(&states) {
                // [B, H, 1, K] [B, H, K, V]
                o.push(q.f_select(1, t)?.f_unsqueeze(-2)?.f_matmul(m)?.f_squeeze_dim(-2)?.f_mul_scalar(self.scale)?);
            }
            finals.push(states.last().unwrap_or(&initial).shallow_clone());
        }
        let o = if o.is_empty() { v.shallow_clone() } else { Tensor::f_stack(&o, 1)? };
        Ok(Outputs { o, final_state: Tensor::f_cat(&finals, 0)? })
    }

    /// Given do `[B, T, H, V]`: `dM_s = scale q_s^T do_s + a_{s+1} dM_{s+1}` and what follows from it.
    pub fn backward(&self, d_o: &Tensor) -> Result<OracleGrads> {
        let (q, k, v, a) = self.double()?;
        let d_o = d_o.f_to_kind(Kind::Double)?.f_mul_scalar(self.scale)?;
        let (dq, dk, dv, dg) = (q.f_zeros_like()?, k.f_zeros_like()?, v.f_zeros_like()?, q.f_zeros_like()?);
        let mut d_initial = Vec::new();
        for doc in self.documents() {
            let (initial, states) = self.states(&k, &v, &a, doc)?;
            let outer = |t: i64| -> Result<Tensor> {
                Ok(q.f_select(1, t)?.f_unsqueeze(-1)?.f_mul(&d_o.f_select(1, t)?.f_unsqueeze(-2)?)?)
            };
            let mut dm = initial.f_zeros_like()?;
            if !self.causal {
                for t in doc.0..doc.1 {
                    dm = dm.f_add(&outer(t)?)?;
                }
            }
            for t in (doc.0..doc.1).rev() {
                let i = (t - doc.0) as usize;
                if self.causal {
                    dm = dm.f_add(&outer(t)?)?;
                }
                let column = |x: &Tensor| -> Result<Tensor> { Ok(x.f_select(1, t)?.f_unsqueeze(-1)?) };
                let put = |x: &Tensor, value: Tensor| -> Result<()> {
                    x.f_select(1, t)?.f_copy_(&value.f_squeeze_dim(-1)?)?;
                    Ok(())
                };
                put(&dq, states[i].f_matmul(&column(&d_o)?)?)?;
                put(&dk, dm.f_matmul(&column(&v)?)?)?;
                put(&dv, dm.f_transpose(-1, -2)?.f_matmul(&column(&k)?)?)?;
                let before = if i == 0 { &initial } else { &states[i - 1] };
                if self.causal {
                    dm = dm.f_mul(&column(&a)?)?;
                    put(&dg, dm.f_mul(before)?.f_sum_dim_intlist(-1, true, Kind::Double)?)?;
                }
            }
            d_initial.push(dm);
        }
        let dlog_decay = match &self.inputs.decay {
            Decay::None => None,
            Decay::Head(_) => Some(dg.f_sum_dim_intlist([0, 1, 3].as_slice(), false, Kind::Double)?),
            Decay::Token(_) => Some(dg.f_sum_dim_intlist(-1, false, Kind::Double)?),
            Decay::Channel(_) => Some(dg),
        };
        Ok(OracleGrads { dq, dk, dv, dlog_decay, dinitial_state: Tensor::f_cat(&d_initial, 0)? })
    }
}
