//! Tensor files and checkpoints: every bit comes back, and what is damaged or half written is told apart.

use std::fs;
use std::path::{Path, PathBuf};

use runtime::checkpoint::{self, TrainState};
use runtime::tensor_file;
use tch::{Device, Kind, Tensor};

/// Raw bytes, shape and kind.
fn bits(tensor: &Tensor) -> (Vec<u8>, Vec<i64>, Kind) {
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.copy_data_u8(&mut bytes, tensor.numel());
    (bytes, tensor.size(), tensor.kind())
}

/// One tensor of each kind, of every byte pattern, NaNs among them.
fn every_kind() -> Vec<(String, Tensor)> {
    let bytes: Vec<u8> = (0..=255).cycle().take(4096).map(|b: u8| b.wrapping_mul(167)).collect();
    let mut tensors = Vec::new();
    for kind in [
        Kind::Double,
        Kind::Float,
        Kind::BFloat16,
        Kind::Half,
        Kind::Int64,
        Kind::Int,
        Kind::Int16,
        Kind::Int8,
        Kind::Uint8,
    ] {
        let count = 4096 / kind.elt_size_in_bytes() as i64;
        let tensor = Tensor::from_data_size(&bytes, &[4, count / 4], kind);
        tensors.push((format!("{kind:?}"), tensor));
    }
    tensors.push(("Bool".to_owned(), Tensor::from_slice(&[true, false, true])));
    tensors.push(("empty".to_owned(), Tensor::zeros([3, 0], (Kind::Float, Device::Cpu))));
    tensors.push(("scalar".to_owned(), Tensor::from(2.5f64)));
    tensors
}

#[test]
fn every_kind_comes_back_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let tensors = every_kind();
    tensor_file::write(&path, &tensors, &[("format", "pt")]).unwrap();
    let back = tensor_file::read(&path, Device::Cpu).unwrap();
    assert_eq!(back.len(), tensors.len());
    for (name, tensor) in &tensors {
        assert_eq!(bits(&back[name]), bits(tensor), "{name}");
    }
    let bytes = fs::read(&path).unwrap();
    tensor_file::write(&path, &tensors, &[("format", "pt")]).unwrap();
    assert_eq!(fs::read(&path).unwrap(), bytes, "the same tensors give the same bytes");
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), tensors.len());
}

#[test]
fn bf16_values_are_those_of_bf16() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let values = [1.0f32, -2.5, 3.0e38, 0.1];
    tensor_file::write(&path, &[("x", Tensor::from_slice(&values).to_kind(Kind::BFloat16))], &[]).unwrap();
    let back = tensor_file::read(&path, Device::Cpu).unwrap();
    let found = Vec::<f32>::try_from(back["x"].to_kind(Kind::Float)).unwrap();
    assert_eq!(found, values.map(|v| half::bf16::from_f32(v).to_f32()));
}

#[test]
fn strided_tensors_and_borrowed_ones_are_written_as_they_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let whole = Tensor::arange(24, (Kind::Int64, Device::Cpu)).view([4, 6]);
    let transposed = whole.transpose(0, 1);
    tensor_file::write(&path, &[("t", &transposed), ("n", &whole.narrow(1, 2, 3))], &[]).unwrap();
    let back = tensor_file::read(&path, Device::Cpu).unwrap();
    assert_eq!(back["t"], transposed);
    assert_eq!(back["n"], whole.narrow(1, 2, 3));
}

#[test]
fn bad_tensor_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    tensor_file::write(&path, &every_kind(), &[]).unwrap();
    let good = fs::read(&path).unwrap();
    let mut bad_header = good.clone();
    bad_header[9] = b'!';
    let mut bad_length = good.clone();
    bad_length[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let foreign = b"\x80\x02pickled and zipped".to_vec();
    let cases = [good[..good.len() - 1].to_vec(), good[..5].to_vec(), vec![], bad_header, bad_length, foreign];
    for bytes in cases {
        fs::write(&path, bytes).unwrap();
        let error = tensor_file::read(&path, Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("x.safetensors is damaged or no safetensors file"), "{error}");
    }
    tensor_file::write(&path, &[("b", Tensor::from_slice(&[true]))], &[]).unwrap();
    let mut bad_bool = fs::read(&path).unwrap();
    *bad_bool.last_mut().unwrap() = 7;
    fs::write(&path, bad_bool).unwrap();
    let error = tensor_file::read(&path, Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("tensor b of") && error.contains("the truth value 7"), "{error}");
    let u64s = br#"{"x":{"dtype":"U64","shape":[1],"data_offsets":[0,8]}}"#;
    let mut other = (u64s.len() as u64).to_le_bytes().to_vec();
    other.extend(u64s);
    other.extend([0; 8]);
    fs::write(&path, other).unwrap();
    let error = tensor_file::read(&path, Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("tensor x of") && error.contains("U64"), "{error}");
    let gone = tensor_file::read(&folder.path().join("gone"), Device::Cpu).unwrap_err().to_string();
    assert!(gone.starts_with("cannot read") && gone.contains("gone"), "{gone}");
}

#[test]
fn a_refused_write_keeps_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let one = Tensor::from(1i64);
    tensor_file::write(&path, &[("x", &one)], &[]).unwrap();
    let before = fs::read(&path).unwrap();
    let twice = tensor_file::write(&path, &[("x", &one), ("x", &one)], &[]).unwrap_err().to_string();
    assert!(twice.contains("its name twice"), "{twice}");
    let complex = Tensor::zeros([1], (Kind::ComplexFloat, Device::Cpu));
    let kind = tensor_file::write(&path, &[("z", complex)], &[]).unwrap_err().to_string();
    assert!(kind.contains("tensor z of") && kind.contains("ComplexFloat"), "{kind}");
    assert_eq!(fs::read(&path).unwrap(), before);
}

fn state(step: u64) -> TrainState {
    TrainState {
        step,
        tokens: step * 4096,
        sequences: step,
        best_val: Some(0.1 + 0.2),
        config_toml: "[train]\nsteps = 3\n".to_owned(),
        ..TrainState::default()
    }
}

fn tensors(value: f64) -> Vec<(String, Tensor)> {
    vec![("w".to_owned(), Tensor::from_slice(&[value, f64::NAN]))]
}

fn save(run: &Path, step: u64, keep: usize) -> PathBuf {
    checkpoint::save(run, &state(step), &tensors(step as f64), &tensors(-(step as f64)), keep).unwrap()
}

fn names(run: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(run.join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[track_caller]
fn assert_loads(path: &Path, step: u64) {
    let loaded = checkpoint::load(path, Device::Cpu).unwrap();
    assert_eq!(loaded.state, state(step));
    assert_eq!(bits(&loaded.model["w"]), bits(&tensors(step as f64)[0].1));
    assert_eq!(bits(&loaded.optimizer["w"]), bits(&tensors(-(step as f64))[0].1));
}

#[test]
fn the_newest_are_kept_and_the_last_is_latest() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    assert_eq!(checkpoint::latest(&run).unwrap(), None);
    for step in [1, 2, 30, 100_000_000_000] {
        let path = save(&run, step, 2);
        assert_loads(&path, step);
        assert_eq!(checkpoint::latest(&run).unwrap(), Some(path));
    }
    assert_eq!(names(&run), ["step-00000030", "step-100000000000"]);
    save(&run, 5, 1);
    assert_eq!(names(&run), ["step-00000005", "step-100000000000"], "the one just written stays");
    fs::write(run.join("checkpoints/notes.txt"), "mine").unwrap();
    fs::create_dir(run.join("checkpoints/best")).unwrap();
    save(&run, 6, 2);
    assert!(names(&run).contains(&"best".to_owned()) && names(&run).contains(&"notes.txt".to_owned()));
}

#[test]
fn an_interrupted_save_harms_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path();
    let first = save(run, 1, 2);
    let half = run.join("checkpoints/step-00000002.tmp");
    fs::create_dir(&half).unwrap();
    fs::write(half.join("model.safetensors.tmp"), "half a").unwrap();
    fs::write(half.join("state.json"), "{").unwrap();
    assert_eq!(checkpoint::latest(run).unwrap(), Some(first.clone()));
    assert_loads(&first, 1);
    let second = save(run, 2, 2);
    assert_eq!(names(run), ["step-00000001", "step-00000002"]);
    assert_loads(&second, 2);
    assert_loads(&first, 1);
}

#[test]
fn a_step_saved_again_is_replaced_and_an_interruption_puts_it_back() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path();
    let path = save(run, 7, 2);
    assert_loads(&save(run, 7, 2), 7);
    assert_eq!(names(run), ["step-00000007"]);

    // Interrupted after the rename, and another save after that: all three are there.
    fs::create_dir(path.with_extension("tmp")).unwrap();
    fs::create_dir(path.with_extension("old")).unwrap();
    assert_loads(&save(run, 7, 2), 7);
    assert_eq!(names(run), ["step-00000007"]);

    let old = path.with_extension("old");
    fs::rename(&path, &old).unwrap();
    fs::create_dir(path.with_extension("tmp")).unwrap();
    assert_eq!(checkpoint::latest(run).unwrap(), Some(old.clone()));
    assert_loads(&old, 7);
    save(run, 8, 2);
    assert_eq!(names(run), ["step-00000007", "step-00000008"]);
    assert_loads(&path, 7);
}

#[test]
fn damage_is_found_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path();
    let path = save(run, 1, 2);
    let fails = |name: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>| {
        let file = path.join(name);
        let good = fs::read(&file).unwrap();
        fs::write(&file, change(good.clone())).unwrap();
        let error = checkpoint::load(&path, Device::Cpu).unwrap_err().to_string();
        fs::write(&file, good).unwrap();
        assert!(error.contains(name), "{error}");
        error
    };
    let flipped = fails("model.safetensors", &|mut bytes| {
        *bytes.last_mut().unwrap() ^= 1;
        bytes
    });
    assert!(flipped.contains("checksum"), "{flipped}");
    fails("optimizer.safetensors", &|bytes| bytes[..bytes.len() / 2].to_vec());
    fails("optimizer.safetensors", &|_| Vec::new());
    fails("state.json", &|bytes| bytes[..bytes.len() / 2].to_vec());
    fails("state.json", &|_| b"{}".to_vec());
    let version = fails("state.json", &|bytes| {
        let text = String::from_utf8(bytes).unwrap();
        text.replace("\"version\": 1", "\"version\": 9").into_bytes()
    });
    assert!(version.contains("version 9, expected 1"), "{version}");
    assert_loads(&path, 1);
    fs::remove_file(path.join("model.safetensors")).unwrap();
    assert!(checkpoint::load(&path, Device::Cpu).unwrap_err().to_string().contains("model.safetensors"));
}
