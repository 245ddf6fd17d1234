//! `notify test`: sends a sample.

use serde_json::json;

use crate::cli::args::Global;
use crate::cli::assemble::{self, Seams};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::Output;
use crate::config::keys::help_with;
use crate::policy::name::NotifierName;
use crate::telemetry::notifications::send_sample;

/// Sends a sample to a notifier, and shows what the other side answered.
///
/// # Errors
/// [`Refusal`] if there is no such notifier, or it has no usable secret.
pub async fn test(global: &Global, name: &NotifierName, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let seams = Seams::real();
    let Some(settings) = config.notifiers.iter().find(|settings| settings.name == *name) else {
        let known: Vec<&str> = config.notifiers.iter().map(|settings| settings.name.as_str()).collect();
        let help = help_with(name.as_str(), known, || format!("write a section `[notify.{name}]`"));
        return Err(Refusal::usage(format!("there is no notifier `{name}` in the configuration: {help}")));
    };
    let notifier = assemble::notifier(settings)?;
    let sent = send_sample(&notifier, &assemble::wires(&seams), &seams.host).await;
    let (exit, answer) = match &sent {
        Ok(answer) => (Exit::Done, answer),
        Err(why) => (Exit::Failed, why),
    };
    output.show(
        || json!({ "notifier": name, "sent": sent.is_ok(), "answer": answer }),
        || format!("{name}: {}: {answer}\n", if sent.is_ok() { "sent" } else { "FAILED" }),
    );
    Ok(exit)
}
