//! `everstep generate`: text that a trained model writes, from a checkpoint, in this process.

use crate::data::Vocabulary;
use crate::weights::{Weights, Which};
use anyhow::{Context, Result, ensure};
use everstep_actors::RunFolder;
use everstep_kernels::{Backend, Decoder, Philox};
use safetensors::tensor::TensorView;
use std::io::Write;
use std::path::Path;

const PURPOSE_SAMPLE: u32 = 3;

/// How tokens are chosen.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Choice {
    /// Text to go on from.
    #[arg(long, default_value = "//! ")]
    pub(crate) prompt: String,
    /// Tokens to write.
    #[arg(long, default_value_t = 300)]
    pub(crate) tokens: usize,
    /// Below 1 likely tokens become likelier; 0 takes the likeliest.
    #[arg(long, default_value_t = 0.7)]
    pub(crate) temperature: f64,
    /// Only the likeliest tokens that together have this probability are taken.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) top_p: f64,
    /// Names the random numbers: the same seed, checkpoint and prompt give the same text.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
}

/// Writes text as it is made. A token that ends a document ends it.
pub(crate) fn write(run: &RunFolder, which: Which, choice: &Choice, out: &mut impl Write) -> Result<()> {
    ensure!(choice.temperature >= 0.0, "--temperature {}: expected at least 0", choice.temperature);
    ensure!(choice.top_p > 0.0 && choice.top_p <= 1.0, "--top-p {}: expected above 0, at most 1", choice.top_p);
    let weights = Weights::load(run, which)?;
    let vocabulary = Vocabulary::of_run(run, &weights.config)?;
    let mut tokens = vocabulary.encode(choice.prompt.as_bytes(), 1)?;
    ensure!(!tokens.is_empty(), "--prompt is empty");
    let (mut decoder, b) = (Decoder::new(weights.model(), &weights.map), weights.backend());
    let random = Philox::new(choice.seed, PURPOSE_SAMPLE, 0);
    let size = weights.config.spec.model.vocabulary;
    let mut text = Shown::new(&vocabulary, &tokens);
    write!(out, "{}", vocabulary.decode(&tokens)?)?;
    for n in 0..choice.tokens {
        let logits = decoder.feed(&b, &tokens[decoder.positions()..])?;
        let all = b.read(&logits)?;
        let next = choose(&all[all.len() - size..], choice, random.uniform(n as u64));
        // A tokenizer's end has no text to show; a line of bytes does.
        if next == vocabulary.end() && vocabulary.file().is_some() {
            break;
        }
        tokens.push(next);
        write!(out, "{}", text.next(next)?)?;
        out.flush()?;
    }
    write!(out, "{}", text.rest()?)?;
    writeln!(out)?;
    Ok(())
}

/// Turns tokens to text as they come. A token's text may depend on the one before it (a space), and a
/// character may take up to four tokens: what is not whole yet is held back that long.
struct Shown<'a> {
    vocabulary: &'a Vocabulary,
    /// Tokens shown last, then those held back.
    tail: Vec<u32>,
    held: usize,
}

impl<'a> Shown<'a> {
    const LONGEST: usize = 4;

    fn new(vocabulary: &'a Vocabulary, before: &[u32]) -> Self {
        let tail = before[before.len().saturating_sub(Self::LONGEST)..].to_vec();
        Self { vocabulary, tail, held: 0 }
    }

    /// What can be shown with one more token.
    fn next(&mut self, token: u32) -> Result<String> {
        self.tail.push(token);
        self.held += 1;
        let shown = self.tail.len() - self.held;
        let (before, now) = (self.vocabulary.decode(&self.tail[..shown])?, self.vocabulary.decode(&self.tail)?);
        if now.ends_with('\u{fffd}') && self.held < Self::LONGEST {
            return Ok(String::new());
        }
        self.tail.drain(..shown);
        self.held = 0;
        Ok(after(&before, &now))
    }

    /// What is held back at the end, whole or not.
    fn rest(&self) -> Result<String> {
        let shown = self.tail.len() - self.held;
        Ok(after(&self.vocabulary.decode(&self.tail[..shown])?, &self.vocabulary.decode(&self.tail)?))
    }
}

/// What `now` has beyond the characters that it shares with `before`.
fn after(before: &str, now: &str) -> String {
    let same = now.chars().zip(before.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    now.split_at(same).1.to_owned()
}

/// Writes the logits of the texts in a file.
pub(crate) fn logits(run: &RunFolder, which: Which, tokens: &Path, out: &Path) -> Result<()> {
    let read = std::fs::read(tokens).with_context(|| format!("cannot read {}", tokens.display()))?;
    let texts: Vec<Vec<u32>> = serde_json::from_slice(&read).with_context(|| tokens.display().to_string())?;
    let weights = Weights::load(run, which)?;
    let (size, length) = (weights.config.spec.model.vocabulary, texts.first().map_or(0, Vec::len));
    let good = |text: &Vec<u32>| text.len() == length && text.iter().all(|t| (*t as usize) < size);
    ensure!(
        length > 0 && texts.iter().all(good),
        "{}: expected texts of one length, tokens below {size}",
        tokens.display()
    );
    let b = weights.backend();
    let mut all: Vec<f32> = Vec::new();
    for text in &texts {
        let logits = Decoder::new(weights.model(), &weights.map).feed(&b, text)?;
        all.extend(b.read(&logits)?.iter());
    }
    let bytes: Vec<u8> = all.iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = TensorView::new(safetensors::Dtype::F32, vec![texts.len(), length, size], &bytes)?;
    safetensors::serialize_to_file([("logits", view)], None, out)
        .with_context(|| format!("cannot write {}", out.display()))
}

/// Draws a token.
fn choose(logits: &[f32], choice: &Choice, uniform: f64) -> u32 {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    if choice.temperature == 0.0 {
        return order[0];
    }
    let max = f64::from(logits[order[0] as usize]);
    let weight = |token: &u32| ((f64::from(logits[*token as usize]) - max) / choice.temperature).exp();
    let weights: Vec<f64> = order.iter().map(weight).collect();
    let total: f64 = weights.iter().sum();
    let mut kept = 0.0;
    let nucleus = weights.iter().take_while(|w| {
        let take = kept < choice.top_p * total;
        kept += *w;
        take
    });
    let nucleus: Vec<f64> = nucleus.copied().collect();
    let mut left = uniform * nucleus.iter().sum::<f64>();
    for (token, weight) in order.iter().zip(&nucleus) {
        left -= weight;
        if left < 0.0 {
            return *token;
        }
    }
    order[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_of_several_tokens_are_shown_whole() -> Result<()> {
        let text = "aü€😀b€".repeat(3);
        let mut shown = Shown::new(&Vocabulary::Bytes, b"a ".map(u32::from).as_slice());
        let parts = text.bytes().map(|byte| shown.next(byte.into())).collect::<Result<Vec<_>>>()?;
        assert_eq!(parts.concat(), text);
        assert_eq!(parts[..4], ["a", "", "ü", ""]);
        // What is no text is shown as that, in the end.
        let junk = (0..8).map(|_| shown.next(0xff)).collect::<Result<String>>()?;
        assert_eq!(junk, "\u{fffd}".repeat(8));
        assert_eq!(shown.next(u32::from(b'!'))?, "!");
        // A text that ends within a character.
        assert_eq!((shown.next(0xc3)?.as_str(), shown.rest()?.as_str()), ("", "\u{fffd}"));
        Ok(())
    }

    #[test]
    fn choices_follow_temperature_and_nucleus() {
        let logits = [0.0f32, 2.0, 1.0, -3.0];
        let with = |temperature, top_p| Choice { prompt: String::new(), tokens: 1, temperature, top_p, seed: 1 };
        let drawn = |choice: &Choice| -> Vec<usize> {
            let mut counts = vec![0; 4];
            (0..1000).for_each(|i| counts[choose(&logits, choice, i as f64 / 1000.0) as usize] += 1);
            counts
        };
        assert_eq!(drawn(&with(0.0, 1.0)), [0, 1000, 0, 0]);
        assert_eq!(drawn(&with(1.0, 0.5)), [0, 1000, 0, 0]);
        let all = drawn(&with(1.0, 1.0));
        let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        for (count, logit) in all.iter().zip(logits) {
            assert!((*count as f64 / 1000.0 - f64::from(logit).exp() / total).abs() < 0.002, "{all:?}");
        }
        let nucleus = drawn(&with(1.0, 0.9));
        assert!(nucleus[0] == 0 && nucleus[3] == 0 && nucleus[1] > 700, "{nucleus:?}");
        assert!(drawn(&with(0.5, 1.0))[1] > all[1]);
    }
}
