//! Sends mail by SMTP: the one file that knows lettre.

use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use lettre::message::{Mailbox, SinglePart};
use lettre::transport::smtp::authentication::Credentials;
use lettre::transport::smtp::client::{Certificate, CertificateStore, Tls, TlsParameters};
use lettre::transport::smtp::extension::ClientId;
use lettre::{Address, AsyncSmtpTransport, AsyncTransport as _, Tokio1Executor};
use uuid::Uuid;

use crate::policy::notifier::{MailSettings, MailTls};
use crate::telemetry::message::Message;
use crate::text::{chain, excerpt};

/// Sends one mail. Returns what the server answered; or why it failed, and whether another attempt can't help.
pub(super) async fn send(
    settings: &MailSettings,
    password: &str,
    message: &Message,
    id: Uuid,
) -> Result<String, (String, bool)> {
    let letter = letter(settings, message, id).map_err(|why| (why, true))?;
    let tls = match settings.tls {
        MailTls::None => Tls::None,
        MailTls::StartTls => Tls::Required(parameters(&settings.server)?),
        MailTls::Implicit => Tls::Wrapper(parameters(&settings.server)?),
    };
    let mut server = AsyncSmtpTransport::<Tokio1Executor>::builder_dangerous(&settings.server)
        .port(settings.port)
        .tls(tls)
        // Attempts are bounded by the clock seam.
        .timeout(None);
    if message.host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b)) {
        server = server.hello_name(ClientId::Domain(message.host.clone()));
    }
    if let Some(username) = &settings.username {
        server = server.credentials(Credentials::new(username.clone(), password.to_owned()));
    }
    match server.build().send(letter).await {
        Ok(response) => {
            let text: Vec<&str> = response.message().collect();
            Ok(format!("{} {}", response.code(), excerpt(&text.join(" "), 200)))
        }
        Err(error) => Err((excerpt(&chain(&error), 300), error.is_permanent())),
    }
}

fn letter(settings: &MailSettings, message: &Message, id: Uuid) -> Result<lettre::Message, String> {
    let mailbox = |address: &String| -> Result<Mailbox, String> {
        let parsed = address.parse::<Address>();
        Ok(Mailbox::new(None, parsed.map_err(|error| format!("`{}`: {error}", excerpt(address, 100)))?))
    };
    let from = mailbox(&settings.from)?;
    let domain = from.email.domain().to_owned();
    let since = message.at.duration_since(Timestamp::UNIX_EPOCH);
    let date = SystemTime::UNIX_EPOCH + Duration::try_from(since).unwrap_or_default();
    let mut letter = lettre::Message::builder()
        .date(date)
        .message_id(Some(format!("<{id}@{domain}>")))
        .from(from)
        // One line without control characters; what is not ASCII is encoded.
        .subject(format!("[snapwarden {}] {}", excerpt(&message.host, 64), message.line()));
    for address in &settings.to {
        letter = letter.to(mailbox(address)?);
    }
    letter.singlepart(SinglePart::plain(message.letter())).map_err(|error| chain(&error))
}

/// The machine's certificate authorities, or the bundled ones where it has none.
fn parameters(server: &str) -> Result<TlsParameters, (String, bool)> {
    let machine = TlsParameters::new_rustls(server.to_owned());
    let bundled = |_| {
        let roots = webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter();
        let roots = roots.filter_map(|root| Certificate::from_der(root.to_vec()).ok());
        let builder = TlsParameters::builder(server.to_owned()).certificate_store(CertificateStore::None);
        roots
            .fold(builder, lettre::transport::smtp::client::TlsParametersBuilder::add_root_certificate)
            .build_rustls()
    };
    machine.or_else(bundled).map_err(|error| (chain(&error), true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::problem::ProblemLine;

    #[test]
    fn a_name_adds_no_header_and_no_line_to_one() {
        let settings = MailSettings {
            server: "localhost".to_owned(),
            port: 25,
            tls: MailTls::None,
            username: None,
            from: "snapwarden@example.com".to_owned(),
            to: vec!["ops@example.com".to_owned(), "boss@example.com".to_owned()],
        };
        let name = "a\r\nBcc: evil@example.com\r\n\r\nhello\u{202e}é";
        let message = Message {
            event: "failure",
            at: "2026-11-01T12:00:00Z".parse().unwrap(),
            host: name.to_owned(),
            policy: None,
            zone: None,
            run_id: None,
            title: name.to_owned(),
            summary: String::new(),
            problems: vec![ProblemLine::new(Some(name), name)],
            next_command: "snapwarden status".to_owned(),
        };
        let letter = letter(&settings, &message, Uuid::nil()).unwrap();
        let text = String::from_utf8(letter.formatted()).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let names: Vec<&str> = head
            .lines()
            .filter(|line| !line.starts_with(' '))
            .filter_map(|line| line.split(':').next())
            .collect();
        let mut sorted = names.clone();
        sorted.sort_unstable();
        let expected = [
            "Content-Transfer-Encoding",
            "Content-Type",
            "Date",
            "From",
            "MIME-Version",
            "Message-ID",
            "Subject",
            "To",
        ];
        assert_eq!(sorted, expected, "{head}");
        assert!(head.contains("Date: Sun, 01 Nov 2026 12:00:00 +0000") && !head.contains("\nBcc"), "{head}");
        assert!(!body.contains("\nBcc") && body.is_ascii(), "{body}");
    }
}
