//! Answers as they are sent: with the headers that all have, after the faults that apply to them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::future;
use futures_util::stream::{self, StreamExt as _};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, DATE};
use http::{HeaderMap, HeaderValue, StatusCode};
use jiff::Timestamp;

use crate::sim::fault::Effect;
use crate::sim::image::Image;
use crate::transport::{Body, Reached, Response, TransportError};

/// An answer before faults and headers that all answers share.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) content: Content,
}

#[derive(Debug)]
pub(super) enum Content {
    Json(serde_json::Value),
    Text(&'static str, String),
    /// This part of an image.
    Image(Arc<Image>, std::ops::Range<u64>),
}

impl Answer {
    pub(super) fn new(status: StatusCode, content: Content) -> Self {
        Self { status, headers: HeaderMap::new(), content }
    }
}

/// The connection broke, and the client can't know whether the request was carried out.
pub(super) fn cut(what: &'static str) -> TransportError {
    TransportError::new(Reached::Unknown, what)
}

/// The answer as it is sent, with the headers that all have, after the faults that apply to it.
/// Counts in `bytes_read` the bytes of the body that the client reads.
pub(super) fn finished(
    answer: Answer,
    effects: Vec<Effect>,
    mut date: Timestamp,
    bytes_read: Arc<AtomicU64>,
) -> Response {
    let Answer { status, mut headers, mut content } = answer;
    let (mut pad, mut end, mut corrupt) = (0, None, Vec::new());
    let mut last_headers = Vec::new();
    for effect in effects {
        match (effect, &mut content) {
            (Effect::Edit(pointer, value), Content::Json(json)) => edit(json, pointer, value),
            (Effect::Header(name, value), _) => last_headers.push((name, value)),
            (Effect::DateSkew(skew), _) => date = date.checked_add(skew).unwrap_or(date),
            (Effect::Pad(spaces), _) => pad += spaces,
            (Effect::CutBody(after), _) | (Effect::Expire(after), Content::Image(..)) => {
                end = Some((after, false));
            }
            (Effect::Stall(after), _) => end = Some((after, true)),
            (Effect::Corrupt(offset), _) => corrupt.push(offset),
            _ => {}
        }
    }
    let (content_type, start, length, chunks): (_, _, _, Box<dyn Iterator<Item = bytes::Bytes> + Send>) =
        match content {
            Content::Json(json) => {
                let bytes = bytes::Bytes::from(json.to_string());
                ("application/json", 0, bytes.len() as u64, Box::new(std::iter::once(bytes)))
            }
            Content::Text(kind, text) => {
                (kind, 0, text.len() as u64, Box::new(std::iter::once(bytes::Bytes::from(text))))
            }
            Content::Image(image, range) => {
                let length = range.end - range.start;
                ("application/octet-stream", range.start, length, Box::new(image.chunks(range)))
            }
        };
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length + pad));
    let date = date.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
    headers.extend(HeaderValue::try_from(date).ok().map(|date| (DATE, date)));
    for (name, value) in last_headers {
        match value {
            Some(value) => drop(headers.insert(name, value)),
            None => drop(headers.remove(name)),
        }
    }
    let corrupted = chunks.scan(start, move |at, chunk| {
        let range = *at..*at + chunk.len() as u64;
        *at = range.end;
        let hits = corrupt.iter().filter(|offset| range.contains(offset));
        Some(hits.fold(chunk, |chunk, offset| flipped(&chunk, offset - range.start)))
    });
    let whole = corrupted.chain(spaces(pad));
    let limited = first_bytes(whole, end.map_or(u64::MAX, |(after, _)| after)).map(move |chunk| {
        bytes_read.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        Ok(chunk)
    });
    // Bytes written so far are sent before the connection breaks: a server sends what it has when it must wait.
    let pause = stream::once(tokio::task::yield_now()).filter_map(|()| future::ready(None));
    let sent = stream::iter(limited).chain(pause);
    let body: Body = match end {
        None => Box::pin(sent),
        Some((_, false)) => {
            let broken = Err(cut("the connection broke in the middle of the answer"));
            Box::pin(sent.chain(stream::once(future::ready(broken))))
        }
        Some((_, true)) => Box::pin(sent.chain(stream::pending())),
    };
    Response { status, headers, body }
}

/// The chunk with all bits of one byte flipped.
fn flipped(chunk: &bytes::Bytes, at: u64) -> bytes::Bytes {
    let mut bytes = chunk.to_vec();
    if let Some(byte) = usize::try_from(at).ok().and_then(|at| bytes.get_mut(at)) {
        *byte = !*byte;
    }
    bytes.into()
}

fn spaces(count: u64) -> impl Iterator<Item = bytes::Bytes> + Send {
    const BLOCK: &[u8] = &[b' '; 4096];
    first_bytes(std::iter::repeat(bytes::Bytes::from_static(BLOCK)), count)
}

/// The first `count` bytes of a sequence of chunks.
fn first_bytes(
    chunks: impl Iterator<Item = bytes::Bytes> + Send,
    count: u64,
) -> impl Iterator<Item = bytes::Bytes> + Send {
    let mut left = count;
    chunks.map_while(move |mut chunk| {
        if left == 0 {
            return None;
        }
        chunk.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        left -= chunk.len() as u64;
        Some(chunk)
    })
}

/// What a client of HTTP/1.1 makes of an answer: its `Content-Length` is believed.
pub(super) fn as_received(response: Response) -> Response {
    let said =
        response.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let Some(said) = said else { return response };
    let body = stream::unfold((response.body, said), |(mut body, left)| async move {
        if left == 0 {
            return None;
        }
        match body.next().await {
            Some(Ok(mut chunk)) => {
                chunk.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                let left = left - chunk.len() as u64;
                Some((Ok(chunk), (body, left)))
            }
            Some(Err(error)) => Some((Err(error), (body, 0))),
            None => Some((Err(cut("the connection broke in the middle of the answer")), (body, 0))),
        }
    });
    Response { body: Box::pin(body), ..response }
}

fn edit(json: &mut serde_json::Value, pointer: &str, value: Option<serde_json::Value>) {
    let Some((parent, name)) = pointer.rsplit_once('/') else { return };
    match (json.pointer_mut(parent), value) {
        (Some(serde_json::Value::Object(fields)), Some(value)) => drop(fields.insert(name.to_owned(), value)),
        (Some(serde_json::Value::Object(fields)), None) => drop(fields.remove(name)),
        (Some(serde_json::Value::Array(entries)), value) => {
            let index = name.parse().unwrap_or(usize::MAX);
            match value {
                Some(value) if index < entries.len() => entries[index] = value,
                None if index < entries.len() => drop(entries.remove(index)),
                _ => {}
            }
        }
        _ => {}
    }
}
