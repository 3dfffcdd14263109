//! What ranks tell each other beside tensors: times, spans, errors. Small and outside of what is timed, so JSON will do.

use anyhow::{Context, Result};
use collectives::Group;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::{Kind, Tensor};

/// Every rank's value, in rank order, on every rank. Collective.
pub fn gather<T: Serialize + DeserializeOwned>(group: &Group, mine: &T) -> Result<Vec<T>> {
    let bytes: Vec<i64> = serde_json::to_vec(mine)?.into_iter().map(i64::from).collect();
    let lengths = numbers(&group.all_gather(&Tensor::f_from_slice(&[bytes.len() as i64])?)?.wait()?)?;
    let gathered = numbers(&group.all_gather_v(&Tensor::f_from_slice(&bytes)?, &lengths)?.wait()?)?;
    let mut rest = gathered.as_slice();
    let mut all = Vec::with_capacity(lengths.len());
    for &length in &lengths {
        let (text, after) = rest.split_at_checked(length as usize).context("a rank's message is cut short")?;
        let text: Vec<u8> = text.iter().map(|&byte| byte as u8).collect();
        all.push(serde_json::from_slice(&text)?);
        rest = after;
    }
    Ok(all)
}

fn numbers(x: &Tensor) -> Result<Vec<i64>> {
    Ok(Vec::try_from(x.f_to_kind(Kind::Int64)?.f_flatten(0, -1)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use collectives::local;

    #[test]
    fn every_rank_has_every_value() {
        let all = local::run(3, |group| -> Result<_> {
            let mine = vec!["é".repeat(group.rank()), group.rank().to_string()];
            gather(&group, &mine)
        });
        let expected: Vec<Vec<String>> = (0..3).map(|rank| vec!["é".repeat(rank), rank.to_string()]).collect();
        assert_eq!(all.unwrap(), vec![expected; 3]);
    }
}
