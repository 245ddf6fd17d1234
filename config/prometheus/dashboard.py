#!/usr/bin/env python3
"""Writes the dashboard for Grafana, or asks a Prometheus every query of it.

    python3 config/prometheus/dashboard.py > config/prometheus/dashboard.json
    python3 config/prometheus/dashboard.py --ask http://127.0.0.1:9090

The second fails if a query is refused, or has no answer though its series should be there from the start.
"""
import json
import sys
import urllib.parse
import urllib.request

# What every query is limited to; the variables of the dashboard.
DAEMON = 'job="snapwarden", instance=~"$instance"'
POLICY = DAEMON + ', policy=~"$policy"'
SECONDS_A_DAY = 86400

# Exoscale gives no limit where an organization has none.
MAY_BE_EMPTY = ("snapwarden_quota_limit",)


def panel(kind, title, description, queries, unit="short", width=8, height=7, **options):
    """Queries are pairs of an expression and a legend."""
    return {"type": kind, "title": title, "description": description, "queries": queries, "unit": unit, "width": width,
            "height": height, "options": options}


def number(title, description, query, unit="short", red_from=1):
    steps = [{"color": "green", "value": None}, {"color": "red", "value": red_from}]
    return panel("stat", title, description, [(query, "")], unit, 4, 4, steps=steps)


ROWS = [
    ("Is everything backed up?", [
        number("Uncovered instances", "Instances that no enabled policy takes or exports snapshots of.",
               f'sum(snapwarden_instances{{{DAEMON}, state="uncovered"}})'),
        number("Without a good snapshot", "Selected instances that have none.",
               f'sum(snapwarden_policy_instances{{{POLICY}, state="none"}})'),
        number("Only old snapshots", "Selected instances whose newest good snapshot is too old.",
               f'sum(snapwarden_policy_instances{{{POLICY}, state="stale"}})'),
        number("Vanished", "Instances that were listed and are not any more, for a week.",
               f'sum(snapwarden_policy_instances{{{POLICY}, state="vanished"}})'),
        number("Corrupt copies", "Copies in archives that are missing or damaged.",
               f'sum(snapwarden_archive_corrupt_images{{{DAEMON}}})'),
        number("Archives not there", "Archives that can't be read, or are not the ones that were used before.",
               f'count(snapwarden_archive_present{{{DAEMON}}} == 0) or vector(0)'),
        panel("timeseries", "Age of the newest good snapshot", "By instance. A saw whose teeth are as long as the schedule's gap.",
              [(f'time() - max by (instance_name, zone) (snapwarden_snapshot_newest_timestamp_seconds{{{POLICY}}})',
                "{{instance_name}} ({{zone}})")], "s", 12),
        panel("timeseries", "Age of the newest verified copy", "By instance and archive. Only a copy survives its instance.",
              [(f'time() - max by (instance_name, archive) (snapwarden_export_newest_verified_timestamp_seconds{{{POLICY}}})',
                "{{instance_name}} in {{archive}}")], "s", 12),
    ]),
    ("Runs", [
        panel("state-timeline", "Result of the last run", "0 success, 1 partial, 2 failed, 3 held.",
              [(f"snapwarden_policy_last_run_result{{{POLICY}}}", "{{policy}} ({{zone}})")], width=12,
              mappings={"0": ("success", "green"), "1": ("partial", "orange"), "2": ("failed", "red"), "3": ("held", "purple")}),
        panel("table", "Since the last success", "By policy and zone, in seconds; beyond twice the interval it is an alert.",
              [(f"time() - snapwarden_policy_last_success_timestamp_seconds{{{POLICY}}}", "")], "s", 6),
        panel("table", "Next run", "Seconds until each policy is due.",
              [(f"snapwarden_policy_next_run_timestamp_seconds{{{POLICY}}} - time()", "")], "s", 6),
        panel("timeseries", "Steps", "Snapshots created and deleted, exports and promotions, in an hour.",
              [(f'sum by (result) (increase(snapwarden_snapshot_{what}s_total{{{POLICY}}}[1h]))', f"{what} {{{{result}}}}")
               for what in ("create", "delete")]
              + [(f'sum by (result) (increase(snapwarden_{what}s_total{{{POLICY}}}[1h]))', f"{what} {{{{result}}}}")
                 for what in ("export", "promote")], width=12),
        panel("timeseries", "Duration of runs", "The 95th percentile in a day.",
              [(f"histogram_quantile(0.95, sum by (le, policy) (rate(snapwarden_policy_run_duration_seconds_bucket{{{POLICY}}}[1d])))",
                "{{policy}}")], "s", 12),
    ]),
    ("Deletions", [
        panel("timeseries", "To be deleted", "Planned, and not deleted yet.",
              [(f"snapwarden_planned_deletes{{{POLICY}}}", "{{policy}} ({{zone}})")]),
        panel("timeseries", "Waiting", "For a change to settle, and by what else keeps them.",
              [(f"snapwarden_pending_deletes{{{POLICY}}}", "pending: {{policy}} ({{zone}})"),
               (f"sum by (policy, reason) (snapwarden_blocked_deletes{{{POLICY}}})", "{{reason}}: {{policy}}")]),
        panel("timeseries", "Snapshots", "Of all selected instances, by state.",
              [(f"sum by (state) (snapwarden_snapshots{{{POLICY}}})", "{{state}}")]),
    ]),
    ("Archives", [
        panel("timeseries", "Size", "Of all images.", [(f"snapwarden_archive_bytes{{{DAEMON}}}", "{{archive}}")], "bytes", 6),
        panel("timeseries", "Free space", "On the file system of each local archive.",
              [(f"snapwarden_archive_free_bytes{{{DAEMON}}}", "{{archive}}")], "bytes", 6),
        panel("timeseries", "Downloads", "Bytes a second.",
              [(f"sum by (policy) (rate(snapwarden_export_bytes_total{{{POLICY}}}[5m]))", "{{policy}}")], "Bps", 6),
        panel("timeseries", "Verified again", "Days since the copy that was verified longest ago.",
              [(f"(time() - snapwarden_archive_last_verify_timestamp_seconds{{{DAEMON}}}) / {SECONDS_A_DAY}", "{{archive}}")], "d", 6),
    ]),
    ("Exoscale and the daemon", [
        panel("timeseries", "Requests", "A second, by status.",
              [(f"sum by (code) (rate(snapwarden_api_requests_total{{{DAEMON}}}[5m]))", "{{code}}")], "reqps", 6),
        panel("timeseries", "Quota", "Used and allowed.",
              [(f"snapwarden_quota_usage{{{DAEMON}}}", "{{resource}} used"), (f"snapwarden_quota_limit{{{DAEMON}}}", "{{resource}} allowed")],
              width=6),
        panel("timeseries", "Memory", "Resident.", [(f"process_resident_memory_bytes{{{DAEMON}}}", "{{instance}}")], "bytes", 6),
        panel("timeseries", "Clock", "How far the host's clock is ahead of Exoscale's.",
              [(f"snapwarden_clock_skew_seconds{{{DAEMON}}}", "{{instance}} ({{zone}})")], "s", 6),
    ]),
]


def variable(name, query):
    return {"name": name, "type": "query", "datasource": {"type": "prometheus", "uid": "${datasource}"}, "query": query, "refresh": 2,
            "includeAll": True, "multi": True, "current": {"text": "All", "value": "$__all"}, "allValue": ".*"}


def dashboard():
    panels, y = [], 0
    for row, of_row in ROWS:
        panels.append({"id": len(panels) + 1, "type": "row", "title": row, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        y, x, high = y + 1, 0, 0
        for one in of_row:
            if x + one["width"] > 24:
                x, y, high = 0, y + high, 0
            defaults = {"unit": one["unit"]}
            if "steps" in one["options"]:
                defaults["thresholds"] = {"mode": "absolute", "steps": one["options"]["steps"]}
            if "mappings" in one["options"]:
                named = one["options"]["mappings"].items()
                defaults["mappings"] = [{"type": "value", "options": {value: {"text": text, "color": color}
                                                                      for value, (text, color) in named}}]
            table = one["type"] == "table"
            panels.append({
                "id": len(panels) + 1, "type": one["type"], "title": one["title"], "description": one["description"],
                "datasource": {"type": "prometheus", "uid": "${datasource}"},
                "gridPos": {"x": x, "y": y, "w": one["width"], "h": one["height"]},
                "fieldConfig": {"defaults": defaults, "overrides": []},
                "targets": [{"refId": chr(65 + number), "expr": expr, "legendFormat": legend, "instant": table,
                             "format": "table" if table else "time_series"}
                            for number, (expr, legend) in enumerate(one["queries"])],
            })
            x, high = x + one["width"], max(high, one["height"])
        y += high
    return {"title": "snapwarden", "uid": "snapwarden", "tags": ["backup"], "timezone": "browser", "schemaVersion": 39, "version": 1,
            "refresh": "1m", "time": {"from": "now-2d", "to": "now"}, "editable": True, "panels": panels,
            "templating": {"list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                variable("instance", "label_values(snapwarden_build_info, instance)"),
                variable("policy", 'label_values(snapwarden_policy_enabled{instance=~"$instance"}, policy)'),
            ]}}


def ask(prometheus):
    empty, asked = [], 0
    for one in (one for _, of_row in ROWS for one in of_row):
        for expr, _ in one["queries"]:
            query = expr.replace("$instance", ".*").replace("$policy", ".*")
            address = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
            with urllib.request.urlopen(address, timeout=30) as answer:
                result = json.load(answer)["data"]["result"]
            asked += 1
            print(f"{len(result):4} {one['title']}: {query}")
            if not result and not any(piece in query for piece in MAY_BE_EMPTY):
                empty.append(query)
    print(f"{asked} queries, {len(empty)} without an answer")
    return 1 if empty else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ask"]:
        sys.exit(ask(sys.argv[2]))
    json.dump(dashboard(), sys.stdout, indent=1)
    print()
