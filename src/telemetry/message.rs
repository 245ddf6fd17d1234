//! What is sent to a notifier, and its forms: JSON, Slack's, text. All names in it come from outside.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use uuid::Uuid;

use crate::policy::name::PolicyName;
use crate::snapshot::ZoneName;
use crate::telemetry::conditions::Condition;
use crate::telemetry::problem::ProblemLine;
use crate::text::{counted, excerpt, safe_json};

/// The longest body of a request, in bytes.
const BODY_MAX: usize = 64 * 1024;

/// How many problems are in one message; commands show all.
const PROBLEMS_MAX: usize = 50;

/// The most characters of a line.
const LINE_MAX: usize = 400;

/// A notification.
#[derive(Debug, Clone)]
pub(super) struct Message {
    /// The name of an event, or `test`, `start`, `success`.
    pub(super) event: &'static str,
    pub(super) at: Timestamp,
    pub(super) host: String,
    pub(super) policy: Option<PolicyName>,
    pub(super) zone: Option<ZoneName>,
    pub(super) run_id: Option<Uuid>,
    pub(super) title: String,
    /// What it is about, without any name.
    pub(super) summary: String,
    pub(super) problems: Vec<ProblemLine>,
    pub(super) next_command: String,
}

/// A message as a webhook gets it.
#[derive(Serialize)]
struct Json<'a> {
    version: u32,
    event: &'a str,
    at: Timestamp,
    host: &'a str,
    policy: &'a Option<PolicyName>,
    zone: &'a Option<ZoneName>,
    run_id: Option<Uuid>,
    title: String,
    text: String,
    problems: Vec<ProblemLine>,
    next_command: &'a str,
}

impl Message {
    /// That a condition is there, or that it is over since it was `sent` last.
    pub(super) fn of(condition: &Condition, sent: Option<Timestamp>, now: Timestamp, host: &str) -> Self {
        let Condition { event, of, policy, zone, run_id, title, problems, next_command, .. } = condition;
        let event = event.as_str();
        let (event, title, summary, problems) = match sent {
            Some(at) => {
                let over = ProblemLine::new(
                    None,
                    format!("the {event} of which you were notified at {at:.0} is over"),
                );
                ("recovered", format!("{of}: recovered"), format!("{event} is over"), vec![over])
            }
            None => (event, format!("{of}: {title}"), title.clone(), problems.clone()),
        };
        Self {
            event,
            at: now,
            host: host.to_owned(),
            policy: policy.clone(),
            zone: zone.clone(),
            run_id: *run_id,
            title,
            summary,
            problems,
            next_command: next_command.clone(),
        }
    }

    /// The first problems, safe to show, and how many more there are.
    fn shown(&self, most: usize) -> (Vec<ProblemLine>, Option<String>) {
        let cut = |problem: &ProblemLine| ProblemLine {
            instance: problem.instance.as_ref().map(|name| excerpt(name, 255)),
            text: excerpt(&problem.text, LINE_MAX),
        };
        let more = self.problems.len().saturating_sub(most);
        let more = (more > 0).then(|| format!("… and {more} more"));
        (self.problems.iter().take(most).map(cut).collect(), more)
    }

    /// One line.
    pub(super) fn line(&self) -> String {
        excerpt(&self.title, LINE_MAX)
    }

    /// All of it for people, without the title.
    pub(super) fn text(&self, most: usize) -> String {
        let (problems, more) = self.shown(most);
        let mut lines: Vec<String> = problems
            .into_iter()
            .map(|ProblemLine { instance, text }| match instance {
                Some(instance) => format!("{instance}: {text}"),
                None => text,
            })
            .collect();
        lines.extend(more);
        lines.join("\n")
    }

    /// [`Message::text`] with the title, where it comes from, and what to do.
    pub(super) fn letter(&self) -> String {
        let run = self.run_id.map_or_else(String::new, |id| format!("\nrun: {id}"));
        format!(
            "{}\n\n{}\n\nhost: {}\nat: {:.0}{run}\nnext: {}\n",
            self.line(),
            self.text(PROBLEMS_MAX),
            excerpt(&self.host, 255),
            self.at,
            self.next_command
        )
    }

    /// The body of a webhook's request.
    pub(super) fn json(&self) -> String {
        bounded(|most| {
            let json = Json {
                version: 1,
                event: self.event,
                at: self.at,
                host: &self.host,
                policy: &self.policy,
                zone: &self.zone,
                run_id: self.run_id,
                title: self.line(),
                text: self.text(most),
                problems: self.shown(most).0,
                next_command: &self.next_command,
            };
            // Nothing in it can fail to become JSON.
            let text = serde_json::to_string(&json).unwrap_or_default();
            safe_json(&text).into_owned()
        })
    }

    /// The body of a request to Slack. Nothing in it is a link, a mention or markup.
    pub(super) fn slack(&self) -> String {
        bounded(|most| {
            let text = format!("{}\n{}", self.line(), self.text(most));
            let text = format!("{text}\n{} · next: {}", excerpt(&self.host, 255), self.next_command);
            json!({
                "text": inert(&text), "mrkdwn": false, "parse": "none", "link_names": false,
                "unfurl_links": false, "unfurl_media": false,
            })
            .to_string()
        })
    }

    /// The body of a ping.
    pub(super) fn ping(&self, details: bool) -> String {
        if details {
            return bounded(|most| format!("{}\n{}", self.line(), self.text(most)));
        }
        let problems = self.problems.len();
        let problems =
            if problems == 0 { String::new() } else { format!(" ({})", counted(problems, "problem")) };
        format!("{}{problems}", self.summary)
    }
}

/// The body with as many problems as fit.
fn bounded(body: impl Fn(usize) -> String) -> String {
    let mut most = PROBLEMS_MAX;
    loop {
        let text = body(most);
        if text.len() <= BODY_MAX || most == 0 {
            return text;
        }
        most /= 2;
    }
}

/// Text that Slack, and those that follow it, take for nothing but text: `<!here>` and `<@U1>` need their brackets, and what
/// stands for them is not read as markup; the rest is replaced by its wide form.
fn inert(text: &str) -> String {
    let mut safe = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '@' => safe.push('＠'),
            '[' => safe.push('［'),
            ']' => safe.push('］'),
            other => safe.push(other),
        }
    }
    safe.replace("://", "：//")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(instance: &str, count: usize) -> Message {
        Message {
            event: "failure",
            at: "2026-11-01T12:00:00Z".parse().unwrap(),
            host: "backup-1".to_owned(),
            policy: None,
            zone: None,
            run_id: None,
            title: format!("policy nightly: {instance}"),
            summary: "the last run failed".to_owned(),
            problems: vec![ProblemLine::new(Some(instance), "no good snapshot"); count],
            next_command: "snapwarden status".to_owned(),
        }
    }

    #[test]
    fn names_are_nothing_but_text_to_slack() {
        let name = "<!here> @channel <@U1> <https://evil.example|x> [a](https://evil.example) & \u{202e}a\nb";
        let body: serde_json::Value = serde_json::from_str(&message(name, 1).slack()).unwrap();
        let text = body["text"].as_str().unwrap();
        for part in ["<", ">", "@", "://", "[", "\u{202e}", "a\nb"] {
            assert!(!text.contains(part), "`{part}`: {text}");
        }
        assert!(text.contains("&lt;!here&gt; ＠channel") && text.contains("&amp;"), "{text}");
        assert_eq!((&body["mrkdwn"], &body["link_names"]), (&false.into(), &false.into()));
    }

    #[test]
    fn a_body_is_bounded_whatever_is_wrong_and_says_how_much_more_there_is() {
        let name = "\u{202e}".repeat(10_000);
        for body in
            [message(&name, 10_000).json(), message(&name, 10_000).slack(), message(&name, 10_000).ping(true)]
        {
            assert!(body.len() <= BODY_MAX, "{}", body.len());
            assert!(body.contains(" more"), "{}", &body[..200]);
        }
    }

    #[test]
    fn a_ping_has_no_names_unless_they_are_asked_for() {
        let message = message("db-1", 2);
        assert_eq!(message.ping(false), "the last run failed (2 problems)");
        assert_eq!(
            message.ping(true),
            "policy nightly: db-1\ndb-1: no good snapshot\ndb-1: no good snapshot"
        );
    }
}
