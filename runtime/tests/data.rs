//! Corpora from files to sequences.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use runtime::config::{Config, DataKind};
use runtime::data::{Corpus, Error, PrepareOptions, RandomSource, Sampler, Source, Summary, prepare};

fn write(folder: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, content).unwrap();
    path
}

fn make(inputs: &[PathBuf], glob: Option<&str>, out: &Path) -> Result<Summary, Error> {
    prepare(inputs, glob, out, &PrepareOptions::default(), false)
}

/// A corpus of documents of the given lengths, in their shuffled order.
fn corpus(folder: &Path, lengths: &[usize]) -> Corpus {
    for (n, &length) in lengths.iter().enumerate() {
        let mut text = format!("{n:04}").into_bytes();
        text.resize(length.max(4), b'a' + (n % 26) as u8);
        write(folder, &format!("in/{n:04}.txt"), text);
    }
    let out = folder.join("corpus.bin");
    make(&[folder.join("in")], None, &out).unwrap();
    Corpus::open(&out).unwrap()
}

#[test]
fn only_distinct_text_whose_name_matches() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write(at, "in/a.py", "print(1)");
    write(at, "in/sub/b.py", "print(2)");
    write(at, "in/sub/same.py", "print(1)");
    write(at, "in/empty.py", "");
    write(at, "in/binary.py", b"a\0b");
    write(at, "in/latin.py", [0xe9, 0xff, b'x']);
    write(at, "in/notes.md", "notes");
    std::os::unix::fs::symlink("nowhere", at.join("in/dangling.py")).unwrap();
    std::os::unix::fs::symlink("a.py", at.join("in/link.py")).unwrap();
    std::os::unix::fs::symlink("..", at.join("in/sub/loop")).unwrap();
    let out = at.join("corpus.bin");
    let summary = make(&[at.join("in")], Some("*.py"), &out).unwrap();
    let expected = Summary {
        files: 8,
        skipped_empty: 1,
        skipped_binary: 1,
        skipped_unreadable: 1,
        duplicates: 2,
        documents: 3,
        tokens: 8 + 8 + 3 + 3,
    };
    assert_eq!(summary, expected);
    let corpus = Corpus::open(&out).unwrap();
    assert_eq!((corpus.documents(), corpus.tokens()), (3, 22));
    let found: BTreeSet<&[u8]> = (0..3).map(|n| corpus.document(n).unwrap()).collect();
    let wanted: [&[u8]; 3] = [b"print(1)", b"print(2)", &[0xe9, 0xff, b'x']];
    assert_eq!(found, BTreeSet::from(wanted));
    assert_eq!(corpus.document(3), None);

    let first = fs::read(&out).unwrap();
    make(&[at.join("in")], Some("*.py"), &out).unwrap();
    assert_eq!(fs::read(&out).unwrap(), first, "the same files give the same corpus");
    let only_sub = make(&[at.join("in")], Some("sub/*.py"), &out).unwrap();
    assert_eq!(only_sub.files, 2);
    assert!(!at.join("corpus.bin.tmp").exists());
}

#[test]
fn a_failed_preparation_leaves_the_old_corpus() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let file = write(at, "in/a.txt", "text");
    let out = at.join("corpus.bin");
    make(&[file], None, &out).unwrap();
    let before = fs::read(&out).unwrap();

    let none = make(&[at.join("in")], Some("*.rs"), &out).unwrap_err().to_string();
    assert!(none.contains("files named *.rs") && none.contains("/in"), "{none}");
    let missing = make(&[at.join("in"), at.join("gone")], None, &out).unwrap_err().to_string();
    assert!(missing.starts_with("cannot read") && missing.contains("gone"), "{missing}");
    assert!(matches!(make(&[at.join("in")], Some("[a"), &out), Err(Error::Glob { .. })));
    let nowhere = make(&[at.join("in")], None, &at.join("none/corpus.bin")).unwrap_err();
    assert!(matches!(nowhere, Error::Write { .. }));
    assert_eq!(fs::read(&out).unwrap(), before);
}

#[test]
fn foreign_and_damaged_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    corpus(at, &[10, 20]);
    let good = fs::read(at.join("corpus.bin")).unwrap();
    let refused = |bytes: &[u8]| {
        let path = write(at, "bad.bin", bytes);
        let error = Corpus::open(&path).unwrap_err();
        assert!(error.to_string().contains("bad.bin"), "{error}");
        error
    };
    assert!(matches!(refused(b""), Error::Foreign { .. }));
    assert!(matches!(refused(b"hello, this is some other kind of file"), Error::Foreign { .. }));
    assert!(matches!(refused(&good[..good.len() - 1]), Error::Damaged { .. }));
    assert!(matches!(refused(&good[..40]), Error::Damaged { .. }));
    let changed = |at: usize, to: u8| {
        let mut bytes = good.clone();
        bytes[at] = to;
        bytes
    };
    assert!(matches!(refused(&changed(8, 2)), Error::Foreign { .. }));
    assert!(matches!(refused(&changed(16, 3)), Error::Damaged { .. }));
    assert!(matches!(refused(&changed(23, 255)), Error::Damaged { .. }));
    assert!(matches!(refused(&changed(32, 1)), Error::Damaged { .. }));
    assert!(matches!(refused(&changed(40, 200)), Error::Damaged { .. }));
    assert!(matches!(Corpus::open(&at.join("gone.bin")), Err(Error::Read { .. })));
    assert!(matches!(Corpus::open(at), Err(Error::Read { .. })));
}

#[test]
fn the_split_is_at_a_document_boundary() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus(folder.path(), &[9; 50]);
    let (train, validation) = corpus.split(0.1);
    assert_eq!((train.documents(), validation.documents()), (45, 5));
    assert_eq!((train.tokens(), validation.tokens()), (450, 50));
    let (train, validation) = corpus.split(0.0);
    assert_eq!((train.documents(), validation.documents()), (50, 0));
    let (train, validation) = corpus.split(1e-6);
    assert_eq!((train.documents(), validation.documents()), (49, 1));
    let (train, validation) = corpus.split(0.999_999);
    assert_eq!((train.documents(), validation.documents()), (1, 49));
}

#[test]
fn too_long_a_sequence_names_the_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus(folder.path(), &[9; 10]);
    let (train, validation) = corpus.split(0.1);
    assert_eq!(train.windows(89).unwrap(), 1);
    let error = train.windows(90).unwrap_err().to_string();
    for part in ["train.seq_len = 90", "91 tokens", "training split", "has 90", "data.path"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(validation.windows(10).is_err());
    assert!(train.sequence(1, 89).is_err());
    assert!(train.windows(0).is_err());
}

#[test]
fn windows_know_their_documents() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus(folder.path(), &[9; 10]);
    let (train, validation) = corpus.split(0.2);
    let first = train.sequence(0, 25).unwrap();
    assert_eq!(first.cu_seqlens, [0, 10, 20, 25]);
    assert_eq!((first.tokens[0], first.tokens[10], first.tokens[20]), (0, 0, 0));
    assert_eq!(first.inputs().len(), 25);
    assert_eq!(first.labels()[9], 0, "the label after a document's last byte ends it");
    assert_eq!(first.labels()[..24], first.inputs()[1..]);
    let second = train.sequence(1, 25).unwrap();
    assert_eq!(second.cu_seqlens, [0, 5, 15, 25]);
    assert_eq!(second.tokens[0], first.tokens[25], "windows share one label");
    assert_eq!(train.sequence(0, 10).unwrap().cu_seqlens, [0, 10]);
    assert_eq!(train.sequence(0, 20).unwrap().joined().cu_seqlens, [0, 20]);
    assert_eq!(validation.sequence(0, 15).unwrap().cu_seqlens, [0, 10, 15]);
}

#[test]
fn an_epoch_visits_every_window_once() {
    let folder = tempfile::tempdir().unwrap();
    let (train, _) = corpus(folder.path(), &[40; 30]).split(0.0);
    let sampler = Sampler::new(train.clone(), 16, 7, true).unwrap();
    let windows = sampler.windows();
    let all: BTreeSet<Vec<i64>> = (0..windows).map(|w| train.sequence(w, 16).unwrap().tokens).collect();
    let epoch =
        |e: u64| -> Vec<Vec<i64>> { (e * windows..(e + 1) * windows).map(|i| sampler.sequence(i).tokens).collect() };
    for e in 0..3 {
        assert_eq!(BTreeSet::from_iter(epoch(e)), all);
    }
    assert_ne!(epoch(0), epoch(1));
    let again = Sampler::new(train, 16, 7, false).unwrap();
    assert_eq!(again.sequence(windows + 3).tokens, sampler.sequence(windows + 3).tokens);
    assert_eq!(again.sequence(3).cu_seqlens, [0, 16]);
}

#[test]
fn random_tokens_are_a_function_of_seed_and_index() {
    let source = RandomSource::new(1000, 5000, 3);
    let sequence = source.sequence(9);
    assert_eq!(sequence, source.sequence(9));
    assert_ne!(sequence, source.sequence(10));
    assert_ne!(sequence, RandomSource::new(1000, 5000, 4).sequence(9));
    assert_eq!((sequence.tokens.len(), sequence.cu_seqlens), (5001, vec![0, 5000]));
    assert!(sequence.tokens.iter().all(|t| (0..1000).contains(t)));
    let mean = sequence.tokens.iter().sum::<i64>() as f64 / 5001.0;
    assert!((mean - 499.5).abs() < 20.0, "{mean}");
}

#[test]
fn sources_follow_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    corpus(folder.path(), &[99; 20]);
    let mut config = Config::default();
    config.data.path = folder.path().join("corpus.bin");
    config.data.validation_fraction = 0.1;
    config.train.seq_len = 50;
    let (train, validation) = Source::open(&config).unwrap();
    assert_eq!(train.windows(), Some(1799 / 50));
    let held_out = validation.unwrap();
    config.train.seed = 5;
    let (_, again) = Source::open(&config).unwrap();
    assert_eq!(held_out.sequence(0), again.unwrap().sequence(0), "validation does not follow the seed");
    config.data.validation_fraction = 0.0;
    assert!(Source::open(&config).unwrap().1.is_none());
    config.train.seq_len = 4096;
    assert!(matches!(Source::open(&config), Err(Error::TooShort { .. })));
    config.data.kind = DataKind::Random;
    assert_eq!(Source::open(&config).unwrap().0.windows(), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn corpus_round_trip(lengths in prop::collection::vec(4usize..60, 1..12), seq_len in 1usize..70, fraction in 0.0f64..1.0) {
        let folder = tempfile::tempdir().unwrap();
        let corpus = corpus(folder.path(), &lengths);
        let mut whole = Vec::new();
        for n in 0..corpus.documents() {
            whole.push(0i64);
            whole.extend(corpus.document(n).unwrap().iter().map(|&b| i64::from(b)));
        }
        prop_assert_eq!(whole.len(), lengths.iter().sum::<usize>() + lengths.len());
        let (train, validation) = corpus.split(fraction);
        prop_assert_eq!(train.tokens() + validation.tokens(), whole.len() as u64);
        let mut start = 0;
        for split in [train, validation] {
            let windows = split.windows(seq_len).unwrap_or(0);
            for w in 0..windows {
                let sequence = split.sequence(w, seq_len).unwrap();
                let at = start + w as usize * seq_len;
                prop_assert_eq!(&sequence.tokens[..], &whole[at..=at + seq_len]);
                let mut boundaries = vec![0];
                boundaries.extend((1..seq_len as i64).filter(|&i| sequence.tokens[i as usize] == 0));
                boundaries.push(seq_len as i64);
                prop_assert_eq!(sequence.cu_seqlens, boundaries);
            }
            start += split.tokens() as usize;
        }
    }
}
