//! What S3 answers in XML, as far as it is read. All of it is hostile: bounded by who reads the body, no entities, and
//! whatever does not have the form that it must have is an error, never an empty list.

use roxmltree::{Document, Node};

use crate::text::excerpt;

/// Something in a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) key: String,
    pub(super) bytes: u64,
    /// Changes when the object does; empty where the store does not tell.
    pub(super) etag: String,
}

/// An upload that was begun and not ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unfinished {
    pub(super) key: String,
    pub(super) id: String,
    /// As the store writes it.
    pub(super) initiated: Option<String>,
}

/// A part of a listing.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Page<T> {
    pub(super) items: Vec<T>,
    /// What to ask the next part with, if there is one: query arguments.
    pub(super) next: Option<Vec<(&'static str, String)>>,
}

/// What an answer is instead of what it should be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NotIt {
    /// The store's own error: its code and its message.
    Error(String, String),
    /// Something that no store should say.
    Strange(String),
}

fn strange<T>(why: impl Into<String>) -> Result<T, NotIt> {
    Err(NotIt::Strange(why.into()))
}

/// Reads an answer whose root must be `root`.
fn read<T>(body: &[u8], root: &str, take: impl FnOnce(Node<'_, '_>) -> Result<T, NotIt>) -> Result<T, NotIt> {
    let Ok(text) = std::str::from_utf8(body) else { return strange("it is no text") };
    // A store that takes its time sends blanks, so that nobody hangs up.
    let document = match Document::parse(text.trim_start()) {
        Ok(document) => document,
        Err(error) => {
            let begins = excerpt(text.trim_start(), 40);
            return strange(format!(
                "it is no XML ({}); it begins with `{begins}`",
                excerpt(&error.to_string(), 100)
            ));
        }
    };
    let element = document.root_element();
    match element.tag_name().name() {
        name if name == root => take(element),
        "Error" => {
            let part = |name| child(element, name).map_or_else(String::new, |text| excerpt(text, 300));
            Err(NotIt::Error(part("Code"), part("Message")))
        }
        name => strange(format!("it is `{}` where `{root}` should be", excerpt(name, 40))),
    }
}

fn child<'a>(element: Node<'a, '_>, name: &str) -> Option<&'a str> {
    element.children().find(|node| node.tag_name().name() == name).map(|node| node.text().unwrap_or_default())
}

fn required<'a>(element: Node<'a, '_>, name: &'static str) -> Result<&'a str, NotIt> {
    match child(element, name).filter(|text| !text.is_empty()) {
        Some(text) => Ok(text),
        None => strange(format!("`{name}` is missing in it")),
    }
}

/// The elements of this name within.
fn all<'a, 'b: 'a>(element: Node<'a, 'b>, name: &'static str) -> impl Iterator<Item = Node<'a, 'b>> {
    element.children().filter(move |node| node.tag_name().name() == name)
}

/// The arguments that ask for what follows, where an answer says that something does.
fn next(
    element: Node<'_, '_>,
    is_encoded: bool,
    names: &[(&'static str, &'static str)],
) -> Result<Option<Vec<(&'static str, String)>>, NotIt> {
    match child(element, "IsTruncated") {
        Some("false") => return Ok(None),
        Some("true") => {}
        // A listing that was cut off must not pass for a whole one.
        _ => return strange("it does not say whether it is whole"),
    }
    let mut arguments = Vec::new();
    for (element_name, argument) in names {
        if let Some(text) = child(element, element_name).filter(|text| !text.is_empty()) {
            let text =
                if is_encoded && argument.ends_with("marker") { decode(text)? } else { text.to_owned() };
            arguments.push((*argument, text));
        }
    }
    if arguments.is_empty() {
        return strange("there should be more, and it does not say how to ask for it");
    }
    Ok(Some(arguments))
}

/// The answer to `ListObjectsV2`.
pub(super) fn objects(body: &[u8]) -> Result<Page<Listed>, NotIt> {
    read(body, "ListBucketResult", |root| {
        let is_encoded = child(root, "EncodingType") == Some("url");
        let mut items = Vec::new();
        for node in all(root, "Contents") {
            let Ok(bytes) = required(node, "Size")?.trim().parse() else {
                return strange("a size in it is no number");
            };
            let key = key_of(node, is_encoded)?;
            let etag = child(node, "ETag").unwrap_or_default().trim_matches('"').to_owned();
            items.push(Listed { key, bytes, etag });
        }
        Ok(Page { items, next: next(root, false, &[("NextContinuationToken", "continuation-token")])? })
    })
}

/// The answer to `ListMultipartUploads`.
pub(super) fn uploads(body: &[u8]) -> Result<Page<Unfinished>, NotIt> {
    read(body, "ListMultipartUploadsResult", |root| {
        let is_encoded = child(root, "EncodingType") == Some("url");
        let mut items = Vec::new();
        for node in all(root, "Upload") {
            items.push(Unfinished {
                key: key_of(node, is_encoded)?,
                id: required(node, "UploadId")?.to_owned(),
                initiated: child(node, "Initiated").map(str::to_owned),
            });
        }
        let markers = [("NextKeyMarker", "key-marker"), ("NextUploadIdMarker", "upload-id-marker")];
        Ok(Page { items, next: next(root, is_encoded, &markers)? })
    })
}

/// The id in the answer to `CreateMultipartUpload`.
pub(super) fn upload_id(body: &[u8]) -> Result<String, NotIt> {
    read(body, "InitiateMultipartUploadResult", |root| Ok(required(root, "UploadId")?.to_owned()))
}

/// The `ETag` in the answer to `CompleteMultipartUpload`, which may be an error although its status is 200.
pub(super) fn completed(body: &[u8]) -> Result<String, NotIt> {
    read(body, "CompleteMultipartUploadResult", |root| {
        Ok(child(root, "ETag").unwrap_or_default().trim_matches('"').to_owned())
    })
}

/// The code and the message of an error, where the body has them.
pub(super) fn error(body: &[u8]) -> (String, String) {
    match read(body, "", |_| Ok(())) {
        Err(NotIt::Error(code, message)) => (code, message),
        _ => Default::default(),
    }
}

fn key_of(node: Node<'_, '_>, is_encoded: bool) -> Result<String, NotIt> {
    let key = required(node, "Key")?;
    if is_encoded { decode(key) } else { Ok(key.to_owned()) }
}

/// Takes percent-encoding away, and `+` for a blank, as stores do both.
fn decode(text: &str) -> Result<String, NotIt> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
                let (Some(high), Some(low)) = (digit(rest.next()), digit(rest.next())) else {
                    return strange("a key in it is wrongly encoded");
                };
                u8::try_from(high * 16 + low).unwrap_or_default()
            }
            byte => byte,
        });
    }
    // Not one of ours then, and shown to nobody.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_is_read_with_its_encoding_and_its_way_on() {
        let body = br#"<?xml version="1.0" encoding="UTF-8"?>
            <ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name><EncodingType>url</EncodingType>
            <IsTruncated>true</IsTruncated><NextContinuationToken>a/b+c=</NextContinuationToken>
            <Contents><Key>z%2Fa%01+b</Key><Size>12</Size><ETag>"e-1"</ETag></Contents></ListBucketResult>"#;
        let page = objects(body).unwrap();
        assert_eq!(page.items, [Listed { key: "z/a\u{1} b".to_owned(), bytes: 12, etag: "e-1".to_owned() }]);
        assert_eq!(page.next, Some(vec![("continuation-token", "a/b+c=".to_owned())]));
        let plain = b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a+b%</Key><Size>1</Size></Contents></ListBucketResult>";
        assert_eq!(objects(plain).unwrap().items[0].key, "a+b%");
    }

    #[test]
    fn what_is_not_a_whole_listing_is_never_a_short_one() {
        let cases: [(&[u8], &str); 9] = [
            (b"", "no XML"),
            (b"<html><body>Sign in</body></html>", "it is `html` where `ListBucketResult` should be"),
            (b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>", "how to ask for it"),
            (b"<ListBucketResult></ListBucketResult>", "whether it is whole"),
            (b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a</Key>", "no XML"),
            (
                b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a</Key><Size>-1</Size></Contents></ListBucketResult>",
                "no number",
            ),
            (
                b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Size>1</Size></Contents></ListBucketResult>",
                "`Key` is missing",
            ),
            (b"\xff\xfe", "no text"),
            (b"<!DOCTYPE a [<!ENTITY x \"y\">]><ListBucketResult>&x;</ListBucketResult>", "no XML"),
        ];
        for (body, why) in cases {
            match objects(body) {
                Err(NotIt::Strange(said)) => assert!(said.contains(why), "{said}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn an_error_is_read_whatever_its_status_was() {
        let body = b"<Error><Code>InternalError</Code><Message>try \x1b[31m again</Message></Error>";
        // A control character is not even XML.
        assert!(matches!(completed(body), Err(NotIt::Strange(_))));
        let body = b"  \n<?xml version=\"1.0\"?><Error><Code>SlowDown</Code><Message>less</Message></Error>";
        assert_eq!(completed(body), Err(NotIt::Error("SlowDown".to_owned(), "less".to_owned())));
        assert_eq!(error(body), ("SlowDown".to_owned(), "less".to_owned()));
        assert_eq!(error(b"<html>"), Default::default());
    }
}
