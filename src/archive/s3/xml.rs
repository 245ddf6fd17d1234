//! The XML of S3's responses, as far as it is needed. It may be hostile: the length is bounded where the body is read,
//! entities are refused, and a response of another form is an error, never an empty list.

use http::StatusCode;
use roxmltree::{Document, Node, ParsingOptions};

use crate::archive::s3::error::S3Cause;
use crate::text::excerpt;

/// An object, as listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ListedObject {
    pub(super) key: String,
    pub(super) bytes: u64,
    /// Changes when the object does; empty where the store gives none.
    pub(super) etag: String,
}

/// An upload that was begun, and neither completed nor aborted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct UnfinishedUpload {
    pub(super) key: String,
    pub(super) id: String,
    /// A time in the form of the store.
    pub(super) initiated: Option<String>,
}

/// A part of an unfinished upload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ListedPart {
    /// Stores count from one.
    pub(super) number: usize,
    pub(super) bytes: u64,
    pub(super) etag: String,
}

/// A version of an object, or a mark that hides all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ListedVersion {
    pub(super) key: String,
    pub(super) id: String,
    /// Whether it is what the key stands for.
    pub(super) is_latest: bool,
    /// Its length; none for a delete marker.
    pub(super) bytes: Option<u64>,
}

/// One page of a listing.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Page<T> {
    pub(super) items: Vec<T>,
    /// The query arguments for the next page, if there is one.
    pub(super) next: Option<Vec<(&'static str, String)>>,
}

/// The most nodes of a response: some 40 for each of a thousand entries, several times.
const NODES_MAX: u32 = 1 << 18;

/// The most quotation marks from one `<` to the next, two for each attribute, and the most declarations of namespaces. Responses
/// have one or two; a key may have some.
const QUOTES_MAX: usize = 64;
const NAMESPACES_MAX: usize = 64;

/// Whether it takes no longer to parse than its length justifies: each attribute is compared with all others of its element, and
/// each element inherits all namespaces.
fn is_simple(text: &str) -> bool {
    let quotes = |tag: &str| tag.bytes().filter(|byte| matches!(byte, b'"' | b'\'')).count();
    text.split('<').all(|tag| quotes(tag) <= QUOTES_MAX) && text.matches("xmlns").count() <= NAMESPACES_MAX
}

fn unexpected<T>(why: impl Into<String>) -> Result<T, S3Cause> {
    Err(S3Cause::Unexpected(why.into()))
}

/// Reads a response whose root element must be `root`.
fn read<T>(
    body: &[u8],
    root: &str,
    take: impl FnOnce(Node<'_, '_>) -> Result<T, S3Cause>,
) -> Result<T, S3Cause> {
    let Ok(text) = std::str::from_utf8(body) else { return unexpected("it is not text") };
    // A store that is slow to complete an upload sends blanks first, to keep the connection alive.
    let text = text.trim_start();
    if !is_simple(text) {
        return unexpected("it has more attributes than any response");
    }
    let options = ParsingOptions { nodes_limit: NODES_MAX, ..ParsingOptions::default() };
    let document = match Document::parse_with_options(text, options) {
        Ok(document) => document,
        Err(error) => {
            let begins = excerpt(text, 40);
            return unexpected(format!(
                "it is not XML ({}); it begins with `{begins}`",
                excerpt(&error.to_string(), 100)
            ));
        }
    };
    let element = document.root_element();
    match element.tag_name().name() {
        name if name == root => take(element),
        "Error" => {
            let part = |name| child(element, name).map_or_else(String::new, |text| excerpt(text, 300));
            Err(S3Cause::Refused {
                status: StatusCode::OK,
                code: part("Code"),
                message: part("Message"),
                retry_after: None,
            })
        }
        name => unexpected(format!("it is `{}` instead of `{root}`", excerpt(name, 40))),
    }
}

fn child<'a>(element: Node<'a, '_>, name: &str) -> Option<&'a str> {
    element.children().find(|node| node.tag_name().name() == name).map(|node| node.text().unwrap_or_default())
}

fn required<'a>(element: Node<'a, '_>, name: &'static str) -> Result<&'a str, S3Cause> {
    match child(element, name).filter(|text| !text.is_empty()) {
        Some(text) => Ok(text),
        None => unexpected(format!("`{name}` is missing in it")),
    }
}

/// The child elements of this name.
fn all<'a, 'b: 'a>(element: Node<'a, 'b>, name: &'static str) -> impl Iterator<Item = Node<'a, 'b>> {
    element.children().filter(move |node| node.tag_name().name() == name)
}

/// The query arguments for the next page, where a response says that there is one.
fn next(
    element: Node<'_, '_>,
    is_encoded: bool,
    names: &[(&'static str, &'static str)],
) -> Result<Option<Vec<(&'static str, String)>>, S3Cause> {
    match child(element, "IsTruncated") {
        Some("false") => return Ok(None),
        Some("true") => {}
        // A listing that was cut off must not pass for a complete one.
        _ => return unexpected("it does not say whether it is complete"),
    }
    let mut arguments = Vec::new();
    for (element_name, argument) in names {
        if let Some(text) = child(element, element_name).filter(|text| !text.is_empty()) {
            // Ids and tokens are never encoded.
            let text = if is_encoded && *argument == "key-marker" { decode(text)? } else { text.to_owned() };
            arguments.push((*argument, text));
        }
    }
    if arguments.is_empty() {
        return unexpected("it is incomplete, and does not say how to continue");
    }
    Ok(Some(arguments))
}

/// Reads the response to `ListObjectsV2`.
pub(super) fn objects(body: &[u8]) -> Result<Page<ListedObject>, S3Cause> {
    read(body, "ListBucketResult", |root| {
        let is_encoded = child(root, "EncodingType") == Some("url");
        let mut items = Vec::new();
        for node in all(root, "Contents") {
            let Ok(bytes) = required(node, "Size")?.trim().parse() else {
                return unexpected("a size in it is not a number");
            };
            let key = key_of(node, is_encoded)?;
            let etag = child(node, "ETag").unwrap_or_default().trim_matches('"').to_owned();
            items.push(ListedObject { key, bytes, etag });
        }
        Ok(Page { items, next: next(root, false, &[("NextContinuationToken", "continuation-token")])? })
    })
}

/// Reads the response to `ListMultipartUploads`.
pub(super) fn uploads(body: &[u8]) -> Result<Page<UnfinishedUpload>, S3Cause> {
    read(body, "ListMultipartUploadsResult", |root| {
        let is_encoded = child(root, "EncodingType") == Some("url");
        let mut items = Vec::new();
        for node in all(root, "Upload") {
            items.push(UnfinishedUpload {
                key: key_of(node, is_encoded)?,
                id: required(node, "UploadId")?.to_owned(),
                initiated: child(node, "Initiated").map(str::to_owned),
            });
        }
        let markers = [("NextKeyMarker", "key-marker"), ("NextUploadIdMarker", "upload-id-marker")];
        Ok(Page { items, next: next(root, is_encoded, &markers)? })
    })
}

/// Reads the response to `ListObjectVersions`.
pub(super) fn versions(body: &[u8]) -> Result<Page<ListedVersion>, S3Cause> {
    read(body, "ListVersionsResult", |root| {
        let is_encoded = child(root, "EncodingType") == Some("url");
        let mut items = Vec::new();
        // In the order of the store: the newest of a key first.
        for node in root.children() {
            let bytes = match node.tag_name().name() {
                "Version" => match required(node, "Size")?.trim().parse() {
                    Ok(bytes) => Some(bytes),
                    Err(_) => return unexpected("a size in it is not a number"),
                },
                "DeleteMarker" => None,
                _ => continue,
            };
            items.push(ListedVersion {
                key: key_of(node, is_encoded)?,
                id: required(node, "VersionId")?.to_owned(),
                is_latest: required(node, "IsLatest")? == "true",
                bytes,
            });
        }
        let markers = [("NextKeyMarker", "key-marker"), ("NextVersionIdMarker", "version-id-marker")];
        Ok(Page { items, next: next(root, is_encoded, &markers)? })
    })
}

/// Reads the response to `ListParts`.
pub(super) fn parts(body: &[u8]) -> Result<Page<ListedPart>, S3Cause> {
    let page = |root: Node<'_, '_>| {
        let mut items = Vec::new();
        for node in all(root, "Part") {
            let (number, bytes) = (required(node, "PartNumber")?.parse(), required(node, "Size")?.parse());
            let (Ok(number), Ok(bytes)) = (number, bytes) else {
                return unexpected("a number in it is not one");
            };
            let etag = required(node, "ETag")?.trim_matches('"').to_owned();
            items.push(ListedPart { number, bytes, etag });
        }
        Ok(Page { items, next: next(root, false, &[("NextPartNumberMarker", "part-number-marker")])? })
    };
    // The second is how some stores name it.
    read(body, "ListPartsResult", page).or_else(|error| match error {
        S3Cause::Unexpected(_) => read(body, "ListPartsResponse", page),
        error => Err(error),
    })
}

/// The id in the response to `CreateMultipartUpload`.
pub(super) fn upload_id(body: &[u8]) -> Result<String, S3Cause> {
    read(body, "InitiateMultipartUploadResult", |root| Ok(required(root, "UploadId")?.to_owned()))
}

/// Checks the response to `CompleteMultipartUpload`, which may be an error although its status is 200.
pub(super) fn completed(body: &[u8]) -> Result<(), S3Cause> {
    read(body, "CompleteMultipartUploadResult", |_| Ok(()))
}

/// The status in the response to `GetBucketVersioning`; empty if it was never switched on.
pub(super) fn versioning(body: &[u8]) -> Result<String, S3Cause> {
    let status = |root: Node<'_, '_>| Ok(excerpt(child(root, "Status").unwrap_or_default(), 40));
    // The second is how some stores name it.
    read(body, "VersioningConfiguration", status)
        .or_else(|_| read(body, "GetBucketVersioningResponse", status))
}

/// How new objects are locked, by the response to `GetObjectLockConfiguration`.
pub(super) fn object_lock(body: &[u8]) -> Result<String, S3Cause> {
    read(body, "ObjectLockConfiguration", |root| {
        let retention = root.descendants().find(|node| node.tag_name().name() == "DefaultRetention");
        let Some(retention) = retention else { return Ok("nothing is locked by default".to_owned()) };
        let part = |name| child(retention, name).map(|text| excerpt(text, 40));
        let lasts = part("Days").map(|days| format!("{days} days"));
        let lasts = lasts.or_else(|| Some(format!("{} years", part("Years")?)));
        Ok(format!("{} for {}", part("Mode").unwrap_or_default(), lasts.unwrap_or_default()))
    })
}

/// The code and the message of an error; empty where the body has none.
pub(super) fn error(body: &[u8]) -> (String, String) {
    match read(body, "", |_| Ok(())) {
        Err(S3Cause::Refused { code, message, .. }) => (code, message),
        _ => Default::default(),
    }
}

fn key_of(node: Node<'_, '_>, is_encoded: bool) -> Result<String, S3Cause> {
    let key = required(node, "Key")?;
    if is_encoded { decode(key) } else { Ok(key.to_owned()) }
}

/// Decodes percent-encoding, and `+` as a blank: stores use both.
fn decode(text: &str) -> Result<String, S3Cause> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
                let (Some(high), Some(low)) = (digit(rest.next()), digit(rest.next())) else {
                    return unexpected("a key in it is not validly encoded");
                };
                u8::try_from(high * 16 + low).unwrap_or_default()
            }
            byte => byte,
        });
    }
    // A key that is not UTF-8 is not one of ours, and is not shown.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_is_read_with_its_encoding_and_the_next_page() {
        let body = br#"<?xml version="1.0" encoding="UTF-8"?>
            <ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name><EncodingType>url</EncodingType>
            <IsTruncated>true</IsTruncated><NextContinuationToken>a/b+c=</NextContinuationToken>
            <Contents><Key>z%2Fa%01+b</Key><Size>12</Size><ETag>"e-1"</ETag></Contents></ListBucketResult>"#;
        let page = objects(body).unwrap();
        assert_eq!(
            page.items,
            [ListedObject { key: "z/a\u{1} b".to_owned(), bytes: 12, etag: "e-1".to_owned() }]
        );
        assert_eq!(page.next, Some(vec![("continuation-token", "a/b+c=".to_owned())]));
        let plain = b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a+b%</Key><Size>1</Size></Contents></ListBucketResult>";
        assert_eq!(objects(plain).unwrap().items[0].key, "a+b%");
    }

    #[test]
    fn what_is_not_a_complete_listing_is_never_a_short_one() {
        let cases: [(&[u8], &str); 9] = [
            (b"", "not XML"),
            (b"<html><body>Sign in</body></html>", "it is `html` instead of `ListBucketResult`"),
            (b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>", "how to continue"),
            (b"<ListBucketResult></ListBucketResult>", "whether it is complete"),
            (b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a</Key>", "not XML"),
            (
                b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a</Key><Size>-1</Size></Contents></ListBucketResult>",
                "not a number",
            ),
            (
                b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Size>1</Size></Contents></ListBucketResult>",
                "`Key` is missing",
            ),
            (b"\xff\xfe", "not text"),
            (b"<!DOCTYPE a [<!ENTITY x \"y\">]><ListBucketResult>&x;</ListBucketResult>", "not XML"),
        ];
        for (body, why) in cases {
            match objects(body) {
                Err(S3Cause::Unexpected(said)) => assert!(said.contains(why), "{said}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn no_response_takes_longer_to_read_than_its_length_justifies() {
        // The time for the first grows with the square of their number, for the second with its cube.
        let attributes = (0..20_000).fold(String::new(), |text, number| text + &format!(" a{number}='>'"));
        let nested =
            (0..2_000).fold(String::new(), |text, number| text + &format!("<a xmlns:n{number}='x'>"));
        let many = "<a/>".repeat(1 << 18);
        for (body, why) in [
            (format!("<ListBucketResult{attributes}/>"), "more attributes than any response"),
            (format!("<ListBucketResult>{nested}"), "more attributes than any response"),
            (format!("<ListBucketResult>{many}</ListBucketResult>"), "nodes limit"),
        ] {
            match objects(body.as_bytes()) {
                Err(S3Cause::Unexpected(said)) => assert!(said.contains(why), "{said}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn versions_are_told_from_what_hides_them() {
        let body = br"<ListVersionsResult><EncodingType>url</EncodingType><IsTruncated>true</IsTruncated>
            <NextKeyMarker>a%2Fb</NextKeyMarker><NextVersionIdMarker>x%2B</NextVersionIdMarker>
            <DeleteMarker><Key>a%2Fb</Key><VersionId>2</VersionId><IsLatest>true</IsLatest></DeleteMarker>
            <Version><Key>a%2Fb</Key><VersionId>1</VersionId><IsLatest>false</IsLatest><Size>7</Size></Version>
            </ListVersionsResult>";
        let page = versions(body).unwrap();
        let one = |id: &str, is_latest, bytes| ListedVersion {
            key: "a/b".to_owned(),
            id: id.to_owned(),
            is_latest,
            bytes,
        };
        assert_eq!(page.items, [one("2", true, None), one("1", false, Some(7))]);
        let next = [("key-marker", "a/b".to_owned()), ("version-id-marker", "x%2B".to_owned())];
        assert_eq!(page.next, Some(next.to_vec()));
        let short = b"<ListVersionsResult><Version><Key>a</Key><IsLatest>true</IsLatest></Version></ListVersionsResult>";
        assert!(versions(short).is_err());
    }

    #[test]
    fn parts_are_read_by_either_name_of_their_list() {
        for root in ["ListPartsResult", "ListPartsResponse"] {
            let part = "<Part><PartNumber>2</PartNumber><ETag>\"e\"</ETag><Size>7</Size></Part>";
            let next = "<NextPartNumberMarker>2</NextPartNumberMarker><IsTruncated>true</IsTruncated>";
            let page = parts(format!("<{root}>{next}{part}</{root}>").as_bytes()).unwrap();
            assert_eq!(page.items, [ListedPart { number: 2, bytes: 7, etag: "e".to_owned() }]);
            assert_eq!(page.next, Some(vec![("part-number-marker", "2".to_owned())]));
        }
        let gone = parts(b"<Error><Code>NoSuchUpload</Code></Error>");
        assert!(matches!(gone, Err(S3Cause::Refused { code, .. }) if code == "NoSuchUpload"));
        assert!(parts(b"<html></html>").is_err());
    }

    #[test]
    fn an_error_is_read_whatever_its_status_was() {
        let body = b"<Error><Code>InternalError</Code><Message>try \x1b[31m again</Message></Error>";
        // A control character is not even XML.
        assert!(matches!(completed(body), Err(S3Cause::Unexpected(_))));
        let body = b"  \n<?xml version=\"1.0\"?><Error><Code>SlowDown</Code><Message>less</Message></Error>";
        assert!(
            matches!(completed(body), Err(S3Cause::Refused { code, message, .. }) if code == "SlowDown" && message == "less")
        );
        assert_eq!(error(body), ("SlowDown".to_owned(), "less".to_owned()));
        assert_eq!(error(b"<html>"), Default::default());
    }
}
