{{- define "snapwarden.name" -}}
{{- if contains "snapwarden" .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-snapwarden" .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "snapwarden.selector" -}}
app.kubernetes.io/name: snapwarden
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "snapwarden.labels" -}}
{{ include "snapwarden.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* The pod of both modes. */}}
{{- define "snapwarden.pod" -}}
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
# Longer than shutdown_grace (30s).
terminationGracePeriodSeconds: 60
{{- if eq .Values.mode "cronjob" }}
restartPolicy: Never
{{- end }}
containers:
  - name: snapwarden
    image: {{ printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) | quote }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    {{- if eq .Values.mode "cronjob" }}
    args: [once]
    {{- else }}
    ports:
      - name: http
        containerPort: 9788
    # Of the scheduler's loop, never of the backups: a stale backup must not end a download.
    livenessProbe:
      httpGet:
        path: /livez
        port: http
      periodSeconds: 30
      timeoutSeconds: 5
      failureThreshold: 4
    readinessProbe:
      httpGet:
        path: /readyz
        port: http
      periodSeconds: 10
      timeoutSeconds: 5
    startupProbe:
      httpGet:
        path: /livez
        port: http
      periodSeconds: 2
      failureThreshold: 60
    {{- end }}
    env:
      - name: EXOSCALE_API_KEY_FILE
        value: /run/secrets/snapwarden/exoscale-api-key
      - name: EXOSCALE_API_SECRET_FILE
        value: /run/secrets/snapwarden/exoscale-api-secret
    securityContext:
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      capabilities:
        drop: [ALL]
    {{- with .Values.resources }}
    resources:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    volumeMounts:
      - name: configuration
        mountPath: /etc/snapwarden
        readOnly: true
      - name: secret
        mountPath: /run/secrets/snapwarden
        readOnly: true
      - name: state
        mountPath: /var/lib/snapwarden
volumes:
  - name: configuration
    configMap:
      name: {{ include "snapwarden.name" . }}
  - name: secret
    secret:
      secretName: {{ .Values.existingSecret }}
      defaultMode: 0440
  - name: state
    persistentVolumeClaim:
      claimName: {{ include "snapwarden.name" . }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
