//! `pause`, `resume` and `trigger`: what a daemon that runs beside the command begins, and does not begin.

use jiff::Timestamp;
use serde_json::json;

use crate::cli::args::Global;
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::Output;
use crate::policy::name::PolicyName;
use crate::text::to_the_second;

/// Pauses a policy: no step of it begins any more, and what it kept stays kept.
///
/// # Errors
/// [`Refusal`] if there is no such policy, or the state cannot be changed.
pub async fn pause(global: &Global, name: &PolicyName, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let policy = assemble::configured(&config, name)?;
    let seams = Seams::real();
    let state = assemble::state(&config, &seams, Use::Changing)?;
    let now = to_the_second(seams.clock.now());
    let before = state.pause(&*seams.clock, name.clone(), now).await?;
    let since = before.unwrap_or(now);
    let (is, at) = (if before.is_some() { "was already" } else { "is" }, to_the_second(since));
    let also = if policy.enabled { "" } else { "; it is not enabled in the configuration either" };
    output.show(
        || json!({ "policy": name, "paused_since": since, "was_paused": before.is_some() }),
        || {
            format!(
                "policy {name} {is} paused by hand since {at}: no step of it begins any more, and what it kept stays kept; \
                 `snapwarden resume {name}` ends that{also}\n"
            )
        },
    );
    Ok(Exit::Done)
}

/// Ends the pause of a policy. One that is not paused is no error.
///
/// # Errors
/// [`Refusal`] if there is no such policy, or the state cannot be changed.
pub async fn resume(global: &Global, name: &PolicyName, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let seams = Seams::real();
    let reading = assemble::state(&config, &seams, Use::Reading)?;
    // One that is not configured any more may still be paused.
    let policy = match assemble::configured(&config, name) {
        Err(refusal) if !reading.controls().await?.paused.contains_key(name) => return Err(refusal),
        known => known.ok(),
    };
    let state = assemble::state(&config, &seams, Use::Changing)?;
    let before = state.resume(&*seams.clock, name.clone()).await?;
    let was = match before {
        Some(since) => format!("is not paused any more (it was since {})", to_the_second(since)),
        None => "was not paused by hand, so nothing changed".to_owned(),
    };
    let still = match policy {
        None => "; the configuration does not have it",
        Some(policy) if !policy.enabled => "; the configuration has `enabled = false`, so it does not run",
        Some(_) => "",
    };
    // Time went on meanwhile: what was to be deleted during the pause is deleted by the next run.
    let look = match policy.filter(|policy| policy.enabled && before.is_some()) {
        Some(_) => format!("look at what its next run deletes: snapwarden plan {name}\n"),
        None => String::new(),
    };
    output.show(
        || json!({ "policy": name, "was_paused": before.is_some() }),
        || format!("policy {name} {was}{still}\n{look}"),
    );
    Ok(Exit::Done)
}

/// Asks the daemon to run a policy now.
///
/// # Errors
/// [`Refusal`] if there is no such policy, it is paused, or the state cannot be changed.
pub async fn trigger(global: &Global, name: &PolicyName, output: Output) -> Result<Exit, Refusal> {
    let mut config = assemble::configuration(global)?;
    let seams = Seams::real();
    assemble::heed_pauses(&mut config, &seams).await?;
    assemble::policy(&config, name)?;
    let state = assemble::state(&config, &seams, Use::Changing)?;
    let at: Timestamp = seams.clock.now();
    state.trigger(&*seams.clock, name.clone()).await?;
    let has_daemon = state.has_daemon().await?;
    let directory = state.path().display();
    let then = if has_daemon {
        "the daemon begins it within 2 s, or when the run in flight has ended, if there is one".to_owned()
    } else {
        format!(
            "no daemon works on {directory}, so nothing happens now; one that starts within an hour begins it, and \
             `snapwarden once {name}` runs the policy without a daemon"
        )
    };
    output.show(
        || json!({ "policy": name, "at": at, "daemon": has_daemon }),
        || format!("a run of policy {name} is asked for: {then}\n"),
    );
    Ok(Exit::Done)
}
