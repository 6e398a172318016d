package table

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	nodev1 "k8s.io/api/node/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// message is a pointer to a generated API type.
type message[T any] interface {
	*T
	Unmarshal([]byte) error
}

// rows makes a rowFunc of a function on the Go type.
func rows[T any, P message[T]](cells func(P) []any) rowFunc {
	return func(enc wire.Encoding, object []byte) ([]any, []metav1.TableRowCondition, error) {
		obj := P(new(T))
		if err := decode(enc, object, obj); err != nil {
			return nil, nil, err
		}
		return cells(obj), nil, nil
	}
}

type columns = []metav1.TableColumnDefinition

const (
	containersHelp = "Names of each container in the template."
	imagesHelp     = "Images referenced by each container in the template."
)

// newPrinters lists the kinds that have columns of their own.
func newPrinters() map[typeKey]*printer {
	return map[typeKey]*printer{
		{"v1", "Pod"}: {columns: podColumns(), row: func(enc wire.Encoding, object []byte) ([]any, []metav1.TableRowCondition, error) {
			pod := &corev1.Pod{}
			if err := decode(enc, object, pod); err != nil {
				return nil, nil, err
			}
			return podCells(pod), podConditions(pod), nil
		}},
		{"v1", "Node"}: {columns: nodeColumns(), row: rows(nodeCells)},
		{"v1", "Namespace"}: {
			columns: columns{nameColumn(), column("Status", "string", "The status of the namespace"), ageColumn()},
			row: rows(func(o *corev1.Namespace) []any {
				return []any{o.Name, string(o.Status.Phase), age(o.ObjectMeta)}
			}),
		},
		{"v1", "ConfigMap"}: {
			columns: columns{nameColumn(), column("Data", "string", corev1.ConfigMap{}.SwaggerDoc()["data"]), ageColumn()},
			row: rows(func(o *corev1.ConfigMap) []any {
				return []any{o.Name, len(o.Data) + len(o.BinaryData), age(o.ObjectMeta)}
			}),
		},
		{"v1", "Secret"}: {
			columns: columns{
				nameColumn(), column("Type", "string", corev1.Secret{}.SwaggerDoc()["type"]),
				column("Data", "string", corev1.Secret{}.SwaggerDoc()["data"]), ageColumn(),
			},
			row: rows(func(o *corev1.Secret) []any {
				return []any{o.Name, string(o.Type), len(o.Data), age(o.ObjectMeta)}
			}),
		},
		{"v1", "ServiceAccount"}: {
			columns: columns{nameColumn(), ageColumn()},
			row:     rows(func(o *corev1.ServiceAccount) []any { return []any{o.Name, age(o.ObjectMeta)} }),
		},
		{"v1", "Event"}:                 {columns: eventColumns(), row: rows(eventCells)},
		{"v1", "Service"}:               {columns: serviceColumns(), row: rows(serviceCells)},
		{"v1", "PersistentVolume"}:      {columns: volumeColumns(), row: rows(volumeCells)},
		{"v1", "PersistentVolumeClaim"}: {columns: claimColumns(), row: rows(claimCells)},
		{"v1", "Endpoints"}: {
			columns: columns{nameColumn(), column("Endpoints", "string", corev1.Endpoints{}.SwaggerDoc()["subsets"]), ageColumn()},
			row: rows(func(o *corev1.Endpoints) []any {
				return []any{o.Name, endpointsText(o), age(o.ObjectMeta)}
			}),
		},
		{"discovery.k8s.io/v1", "EndpointSlice"}: {columns: sliceColumns(), row: rows(sliceCells)},
		{"coordination.k8s.io/v1", "Lease"}: {
			columns: columns{nameColumn(), column("Holder", "string", coordinationv1.LeaseSpec{}.SwaggerDoc()["holderIdentity"]), ageColumn()},
			row: rows(func(o *coordinationv1.Lease) []any {
				return []any{o.Name, deref(o.Spec.HolderIdentity, ""), age(o.ObjectMeta)}
			}),
		},
		{"apps/v1", "Deployment"}:  {columns: deploymentColumns(), row: rows(deploymentCells)},
		{"apps/v1", "ReplicaSet"}:  {columns: replicaSetColumns(), row: rows(replicaSetCells)},
		{"apps/v1", "DaemonSet"}:   {columns: daemonSetColumns(), row: rows(daemonSetCells)},
		{"apps/v1", "StatefulSet"}: {columns: statefulSetColumns(), row: rows(statefulSetCells)},
		{"batch/v1", "Job"}:        {columns: jobColumns(), row: rows(jobCells)},
		{"batch/v1", "CronJob"}:    {columns: cronJobColumns(), row: rows(cronJobCells)},
		{"storage.k8s.io/v1", "StorageClass"}: {
			columns: storageClassColumns(), row: rows(storageClassCells),
		},
		{"storage.k8s.io/v1", "CSIDriver"}: {columns: csiDriverColumns(), row: rows(csiDriverCells)},
		{"storage.k8s.io/v1", "CSINode"}: {
			columns: columns{
				nameColumn(), column("Drivers", "integer", "Drivers indicates the number of CSI drivers registered on the node"), ageColumn(),
			},
			row: rows(func(o *storagev1.CSINode) []any {
				return []any{o.Name, len(o.Spec.Drivers), age(o.ObjectMeta)}
			}),
		},
		{"node.k8s.io/v1", "RuntimeClass"}: {
			// The API server looks up the handler's description in the wrong
			// type, so it is empty.
			columns: columns{nameColumn(), column("Handler", "string", ""), ageColumn()},
			row:     rows(func(o *nodev1.RuntimeClass) []any { return []any{o.Name, o.Handler, age(o.ObjectMeta)} }),
		},
		{"networking.k8s.io/v1", "Ingress"}: {columns: ingressColumns(), row: rows(ingressCells)},
		{"networking.k8s.io/v1", "NetworkPolicy"}: {
			columns: columns{
				nameColumn(), column("Pod-Selector", "string", networkingv1.NetworkPolicySpec{}.SwaggerDoc()["podSelector"]), ageColumn(),
			},
			row: rows(func(o *networkingv1.NetworkPolicy) []any {
				return []any{o.Name, metav1.FormatLabelSelector(&o.Spec.PodSelector), age(o.ObjectMeta)}
			}),
		},
		{"scheduling.k8s.io/v1", "PriorityClass"}: {columns: priorityClassColumns(), row: rows(priorityClassCells)},
	}
}

func deref[T any](p *T, zero T) T {
	if p == nil {
		return zero
	}
	return *p
}

// containerText lists names and images.
func containerText(containers []corev1.Container) (names, images string) {
	var n, i []string
	for _, c := range containers {
		n, i = append(n, c.Name), append(i, c.Image)
	}
	return strings.Join(n, ","), strings.Join(i, ",")
}

// firstThree joins up to three of a list and counts the rest.
func firstThree(list []string) string {
	if len(list) > 3 {
		return fmt.Sprintf("%s + %d more...", strings.Join(list[:3], ","), len(list)-3)
	}
	return strings.Join(list, ",")
}

func nodeColumns() columns {
	info, status := corev1.NodeSystemInfo{}.SwaggerDoc(), corev1.NodeStatus{}.SwaggerDoc()
	return columns{
		nameColumn(),
		column("Status", "string", "The status of the node"),
		column("Roles", "string", "The roles of the node"),
		ageColumn(),
		column("Version", "string", info["kubeletVersion"]),
		wide("Internal-IP", status["addresses"]),
		wide("External-IP", status["addresses"]),
		wide("OS-Image", info["osImage"]),
		wide("Kernel-Version", info["kernelVersion"]),
		wide("Container-Runtime", info["containerRuntimeVersion"]),
	}
}

func nodeCells(o *corev1.Node) []any {
	status := "Unknown"
	for _, c := range o.Status.Conditions {
		switch {
		case c.Type != corev1.NodeReady:
		case c.Status == corev1.ConditionTrue:
			status = "Ready"
		default:
			status = "NotReady"
		}
	}
	if o.Spec.Unschedulable {
		status += ",SchedulingDisabled"
	}
	info := o.Status.NodeInfo
	kernel := orUnknown(info.KernelVersion)
	if info.Architecture != "" {
		kernel += " (" + info.Architecture + ")"
	}
	return []any{
		o.Name, status, nodeRoles(o), age(o.ObjectMeta), info.KubeletVersion,
		nodeAddress(o, corev1.NodeInternalIP), nodeAddress(o, corev1.NodeExternalIP),
		orUnknown(info.OSImage), kernel, orUnknown(info.ContainerRuntimeVersion),
	}
}

func nodeRoles(o *corev1.Node) string {
	var roles []string
	for k, v := range o.Labels {
		if role, ok := strings.CutPrefix(k, "node-role.kubernetes.io/"); ok && role != "" {
			roles = append(roles, role)
		} else if k == "kubernetes.io/role" && v != "" {
			roles = append(roles, v)
		}
	}
	slices.Sort(roles)
	return orNone(strings.Join(slices.Compact(roles), ","))
}

func nodeAddress(o *corev1.Node, typ corev1.NodeAddressType) string {
	for _, a := range o.Status.Addresses {
		if a.Type == typ {
			return a.Address
		}
	}
	return "<none>"
}

func orUnknown(s string) string {
	if s == "" {
		return "<unknown>"
	}
	return s
}

func eventColumns() columns {
	doc := corev1.Event{}.SwaggerDoc()
	name := nameColumn()
	name.Priority = 1
	return columns{
		column("Last Seen", "string", doc["lastTimestamp"]),
		column("Type", "string", doc["type"]),
		column("Reason", "string", doc["reason"]),
		column("Object", "string", doc["involvedObject"]),
		wide("Subobject", corev1.ObjectReference{}.SwaggerDoc()["fieldPath"]),
		wide("Source", doc["source"]),
		column("Message", "string", doc["message"]),
		wide("First Seen", doc["firstTimestamp"]),
		wide("Count", doc["count"]),
		name,
	}
}

func eventCells(o *corev1.Event) []any {
	first := since(o.FirstTimestamp.Time)
	if o.FirstTimestamp.IsZero() {
		first = since(o.EventTime.Time)
	}
	last := since(o.LastTimestamp.Time)
	if o.LastTimestamp.IsZero() {
		last = first
	}
	count := o.Count
	if o.Series != nil {
		last = since(o.Series.LastObservedTime.Time)
		count = o.Series.Count
	} else if count == 0 {
		count = 1 // events of the newer API count only in a series
	}
	target := strings.ToLower(o.InvolvedObject.Kind)
	if o.InvolvedObject.Name != "" {
		target += "/" + o.InvolvedObject.Name
	}
	source := orElse(o.Source.Component, o.ReportingController)
	if instance := orElse(o.Source.Host, o.ReportingInstance); instance != "" {
		source += ", " + instance
	}
	return []any{
		last, o.Type, o.Reason, target, o.InvolvedObject.FieldPath, source,
		strings.TrimSpace(o.Message), first, count, o.Name,
	}
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

func serviceColumns() columns {
	doc := corev1.ServiceSpec{}.SwaggerDoc()
	return columns{
		nameColumn(),
		column("Type", "string", doc["type"]),
		column("Cluster-IP", "string", doc["clusterIP"]),
		column("External-IP", "string", doc["externalIPs"]),
		column("Port(s)", "string", doc["ports"]),
		ageColumn(),
		wide("Selector", doc["selector"]),
	}
}

func serviceCells(o *corev1.Service) []any {
	internal := "<none>"
	if len(o.Spec.ClusterIPs) > 0 {
		internal = o.Spec.ClusterIPs[0]
	}
	var ports []string
	for _, p := range o.Spec.Ports {
		text := strconv.Itoa(int(p.Port))
		if p.NodePort > 0 {
			text += ":" + strconv.Itoa(int(p.NodePort))
		}
		ports = append(ports, text+"/"+string(p.Protocol))
	}
	return []any{
		o.Name, string(o.Spec.Type), internal, externalIP(o), orNone(strings.Join(ports, ",")), age(o.ObjectMeta),
		labels.FormatLabels(o.Spec.Selector),
	}
}

func externalIP(o *corev1.Service) string {
	switch o.Spec.Type {
	case corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort:
		return orNone(strings.Join(o.Spec.ExternalIPs, ","))
	case corev1.ServiceTypeLoadBalancer:
		var ips []string
		for _, in := range o.Status.LoadBalancer.Ingress {
			ips = append(ips, orElse(in.IP, in.Hostname))
		}
		ips = append(balancers(ips), o.Spec.ExternalIPs...)
		if len(ips) == 0 {
			return "<pending>"
		}
		return strings.Join(ips, ",")
	case corev1.ServiceTypeExternalName:
		return o.Spec.ExternalName
	}
	return "<unknown>"
}

// balancers sorts addresses and drops empty and double ones.
func balancers(addresses []string) []string {
	slices.Sort(addresses)
	addresses = slices.Compact(addresses)
	return slices.DeleteFunc(addresses, func(a string) bool { return a == "" })
}

func endpointsText(o *corev1.Endpoints) string {
	if len(o.Subsets) == 0 {
		return "<none>"
	}
	var list []string
	for _, subset := range o.Subsets {
		if len(subset.Ports) == 0 { // a headless service may have none
			for _, a := range subset.Addresses {
				list = append(list, a.IP)
			}
		}
		for _, port := range subset.Ports {
			for _, a := range subset.Addresses {
				list = append(list, net.JoinHostPort(a.IP, strconv.Itoa(int(port.Port))))
			}
		}
	}
	return firstThree(list)
}

func sliceColumns() columns {
	doc := discoveryv1.EndpointSlice{}.SwaggerDoc()
	return columns{
		nameColumn(),
		column("AddressType", "string", doc["addressType"]),
		column("Ports", "string", doc["ports"]),
		column("Endpoints", "string", doc["endpoints"]),
		ageColumn(),
	}
}

func sliceCells(o *discoveryv1.EndpointSlice) []any {
	var ports, addresses []string
	for _, p := range o.Ports {
		switch {
		case p.Port != nil:
			ports = append(ports, strconv.Itoa(int(*p.Port)))
		case p.Name != nil:
			ports = append(ports, *p.Name)
		default:
			ports = append(ports, "*")
		}
	}
	for _, e := range o.Endpoints {
		addresses = append(addresses, e.Addresses...)
	}
	return []any{o.Name, string(o.AddressType), orUnset(firstThree(ports)), orUnset(firstThree(addresses)), age(o.ObjectMeta)}
}

func orUnset(s string) string {
	if s == "" {
		return "<unset>"
	}
	return s
}

func deploymentColumns() columns {
	doc := appsv1.DeploymentStatus{}.SwaggerDoc()
	return columns{
		nameColumn(),
		column("Ready", "string", "Number of the pod with ready state"),
		column("Up-to-date", "string", doc["updatedReplicas"]),
		column("Available", "string", doc["availableReplicas"]),
		ageColumn(),
		wide("Containers", containersHelp),
		wide("Images", imagesHelp),
		wide("Selector", appsv1.DeploymentSpec{}.SwaggerDoc()["selector"]),
	}
}

func deploymentCells(o *appsv1.Deployment) []any {
	names, images := containerText(o.Spec.Template.Spec.Containers)
	text := "<invalid>"
	if selector, err := metav1.LabelSelectorAsSelector(o.Spec.Selector); err == nil {
		text = selector.String()
	}
	return []any{
		o.Name, fmt.Sprintf("%d/%d", o.Status.ReadyReplicas, deref(o.Spec.Replicas, 0)),
		o.Status.UpdatedReplicas, o.Status.AvailableReplicas, age(o.ObjectMeta), names, images, text,
	}
}

func replicaSetColumns() columns {
	status, spec := appsv1.ReplicaSetStatus{}.SwaggerDoc(), appsv1.ReplicaSetSpec{}.SwaggerDoc()
	return columns{
		nameColumn(),
		column("Desired", "integer", spec["replicas"]),
		column("Current", "integer", status["replicas"]),
		column("Ready", "integer", status["readyReplicas"]),
		ageColumn(),
		wide("Containers", containersHelp),
		wide("Images", imagesHelp),
		wide("Selector", spec["selector"]),
	}
}

func replicaSetCells(o *appsv1.ReplicaSet) []any {
	names, images := containerText(o.Spec.Template.Spec.Containers)
	return []any{
		o.Name, deref(o.Spec.Replicas, 0), o.Status.Replicas, o.Status.ReadyReplicas, age(o.ObjectMeta),
		names, images, metav1.FormatLabelSelector(o.Spec.Selector),
	}
}

func daemonSetColumns() columns {
	doc := appsv1.DaemonSetStatus{}.SwaggerDoc()
	return columns{
		nameColumn(),
		column("Desired", "integer", doc["desiredNumberScheduled"]),
		column("Current", "integer", doc["currentNumberScheduled"]),
		column("Ready", "integer", doc["numberReady"]),
		column("Up-to-date", "integer", doc["updatedNumberScheduled"]),
		column("Available", "integer", doc["numberAvailable"]),
		column("Node Selector", "string", corev1.PodSpec{}.SwaggerDoc()["nodeSelector"]),
		ageColumn(),
		wide("Containers", containersHelp),
		wide("Images", imagesHelp),
		wide("Selector", appsv1.DaemonSetSpec{}.SwaggerDoc()["selector"]),
	}
}

func daemonSetCells(o *appsv1.DaemonSet) []any {
	names, images := containerText(o.Spec.Template.Spec.Containers)
	return []any{
		o.Name, o.Status.DesiredNumberScheduled, o.Status.CurrentNumberScheduled, o.Status.NumberReady,
		o.Status.UpdatedNumberScheduled, o.Status.NumberAvailable,
		labels.FormatLabels(o.Spec.Template.Spec.NodeSelector), age(o.ObjectMeta),
		names, images, metav1.FormatLabelSelector(o.Spec.Selector),
	}
}

func statefulSetColumns() columns {
	return columns{
		nameColumn(),
		column("Ready", "string", "Number of the pod with ready state"),
		ageColumn(),
		wide("Containers", containersHelp),
		wide("Images", imagesHelp),
	}
}

func statefulSetCells(o *appsv1.StatefulSet) []any {
	names, images := containerText(o.Spec.Template.Spec.Containers)
	return []any{
		o.Name, fmt.Sprintf("%d/%d", o.Status.ReadyReplicas, deref(o.Spec.Replicas, 0)), age(o.ObjectMeta), names, images,
	}
}

func jobColumns() columns {
	return columns{
		nameColumn(),
		column("Status", "string", "Status of the job."),
		column("Completions", "string", batchv1.JobStatus{}.SwaggerDoc()["succeeded"]),
		column("Duration", "string", "Time required to complete the job."),
		ageColumn(),
		wide("Containers", containersHelp),
		wide("Images", imagesHelp),
		wide("Selector", batchv1.JobSpec{}.SwaggerDoc()["selector"]),
	}
}

func jobCells(o *batchv1.Job) []any {
	completions := fmt.Sprintf("%d/1", o.Status.Succeeded)
	if o.Spec.Completions != nil {
		completions = fmt.Sprintf("%d/%d", o.Status.Succeeded, *o.Spec.Completions)
	} else if p := deref(o.Spec.Parallelism, 0); p > 1 {
		completions += fmt.Sprintf(" of %d", p)
	}
	took := ""
	if start := o.Status.StartTime; start != nil {
		end := time.Now()
		if o.Status.CompletionTime != nil {
			end = o.Status.CompletionTime.Time
		}
		took = duration.HumanDuration(end.Sub(start.Time))
	}
	names, images := containerText(o.Spec.Template.Spec.Containers)
	return []any{
		o.Name, jobStatus(o), completions, took, age(o.ObjectMeta),
		names, images, metav1.FormatLabelSelector(o.Spec.Selector),
	}
}

func jobStatus(o *batchv1.Job) string {
	is := func(typ batchv1.JobConditionType) bool {
		for _, c := range o.Status.Conditions {
			if c.Type == typ {
				return c.Status == corev1.ConditionTrue
			}
		}
		return false
	}
	switch {
	case is(batchv1.JobComplete):
		return "Complete"
	case is(batchv1.JobFailed):
		return "Failed"
	case o.DeletionTimestamp != nil:
		return "Terminating"
	case is(batchv1.JobSuspended):
		return "Suspended"
	case is(batchv1.JobFailureTarget):
		return "FailureTarget"
	case is(batchv1.JobSuccessCriteriaMet):
		return "SuccessCriteriaMet"
	}
	return "Running"
}

func cronJobColumns() columns {
	spec, status := batchv1.CronJobSpec{}.SwaggerDoc(), batchv1.CronJobStatus{}.SwaggerDoc()
	return columns{
		nameColumn(),
		column("Schedule", "string", spec["schedule"]),
		column("Timezone", "string", spec["timeZone"]),
		column("Suspend", "boolean", spec["suspend"]),
		column("Active", "integer", status["active"]),
		column("Last Schedule", "string", status["lastScheduleTime"]),
		ageColumn(),
		wide("Containers", containersHelp),
		wide("Images", imagesHelp),
		wide("Selector", batchv1.JobSpec{}.SwaggerDoc()["selector"]),
	}
}

func cronJobCells(o *batchv1.CronJob) []any {
	last := "<none>"
	if o.Status.LastScheduleTime != nil {
		last = since(o.Status.LastScheduleTime.Time)
	}
	suspend := "<unset>"
	if o.Spec.Suspend != nil {
		suspend = "False"
		if *o.Spec.Suspend {
			suspend = "True"
		}
	}
	job := &o.Spec.JobTemplate.Spec
	names, images := containerText(job.Template.Spec.Containers)
	return []any{
		o.Name, o.Spec.Schedule, deref(o.Spec.TimeZone, "<none>"), suspend, len(o.Status.Active), last, age(o.ObjectMeta),
		names, images, metav1.FormatLabelSelector(job.Selector),
	}
}

func volumeColumns() columns {
	spec, status := corev1.PersistentVolumeSpec{}.SwaggerDoc(), corev1.PersistentVolumeStatus{}.SwaggerDoc()
	return columns{
		nameColumn(),
		column("Capacity", "string", spec["capacity"]),
		column("Access Modes", "string", spec["accessModes"]),
		column("Reclaim Policy", "string", spec["persistentVolumeReclaimPolicy"]),
		column("Status", "string", status["phase"]),
		column("Claim", "string", spec["claimRef"]),
		column("StorageClass", "string", "StorageClass of the pv"),
		column("VolumeAttributesClass", "string", "VolumeAttributesClass of the pv"),
		column("Reason", "string", status["reason"]),
		ageColumn(),
		wide("VolumeMode", spec["volumeMode"]),
	}
}

func volumeCells(o *corev1.PersistentVolume) []any {
	claim := ""
	if ref := o.Spec.ClaimRef; ref != nil {
		claim = ref.Namespace + "/" + ref.Name
	}
	phase := string(o.Status.Phase)
	if o.DeletionTimestamp != nil {
		phase = "Terminating"
	}
	class, ok := o.Annotations[corev1.BetaStorageClassAnnotation]
	if !ok {
		class = o.Spec.StorageClassName
	}
	size := o.Spec.Capacity[corev1.ResourceStorage]
	return []any{
		o.Name, size.String(), accessModes(o.Spec.AccessModes), string(o.Spec.PersistentVolumeReclaimPolicy),
		phase, claim, class, deref(o.Spec.VolumeAttributesClassName, "<unset>"),
		o.Status.Reason, age(o.ObjectMeta), string(deref(o.Spec.VolumeMode, "<unset>")),
	}
}

func claimColumns() columns {
	spec, status := corev1.PersistentVolumeClaimSpec{}.SwaggerDoc(), corev1.PersistentVolumeClaimStatus{}.SwaggerDoc()
	return columns{
		nameColumn(),
		column("Status", "string", status["phase"]),
		column("Volume", "string", spec["volumeName"]),
		column("Capacity", "string", status["capacity"]),
		column("Access Modes", "string", status["accessModes"]),
		column("StorageClass", "string", "StorageClass of the pvc"),
		column("VolumeAttributesClass", "string", "VolumeAttributesClass of the pvc"),
		ageColumn(),
		wide("VolumeMode", spec["volumeMode"]),
	}
}

func claimCells(o *corev1.PersistentVolumeClaim) []any {
	phase := string(o.Status.Phase)
	if o.DeletionTimestamp != nil {
		phase = "Terminating"
	}
	capacity, modes := "", ""
	if o.Spec.VolumeName != "" {
		modes = accessModes(o.Status.AccessModes)
		size := o.Status.Capacity[corev1.ResourceStorage]
		capacity = size.String()
	}
	class, ok := o.Annotations[corev1.BetaStorageClassAnnotation]
	if !ok {
		class = deref(o.Spec.StorageClassName, "")
	}
	return []any{
		o.Name, phase, o.Spec.VolumeName, capacity, modes, class,
		deref(o.Spec.VolumeAttributesClassName, "<unset>"), age(o.ObjectMeta),
		string(deref(o.Spec.VolumeMode, "<unset>")),
	}
}

func accessModes(modes []corev1.PersistentVolumeAccessMode) string {
	var out []string
	for _, m := range []struct {
		mode corev1.PersistentVolumeAccessMode
		text string
	}{
		{corev1.ReadWriteOnce, "RWO"},
		{corev1.ReadOnlyMany, "ROX"},
		{corev1.ReadWriteMany, "RWX"},
		{corev1.ReadWriteOncePod, "RWOP"},
	} {
		if slices.Contains(modes, m.mode) {
			out = append(out, m.text)
		}
	}
	return strings.Join(out, ",")
}

func storageClassColumns() columns {
	doc := storagev1.StorageClass{}.SwaggerDoc()
	return columns{
		nameColumn(),
		column("Provisioner", "string", doc["provisioner"]),
		column("ReclaimPolicy", "string", doc["reclaimPolicy"]),
		column("VolumeBindingMode", "string", doc["volumeBindingMode"]),
		column("AllowVolumeExpansion", "string", doc["allowVolumeExpansion"]),
		ageColumn(),
	}
}

func storageClassCells(o *storagev1.StorageClass) []any {
	name := o.Name
	if o.Annotations["storageclass.kubernetes.io/is-default-class"] == "true" ||
		o.Annotations["storageclass.beta.kubernetes.io/is-default-class"] == "true" {
		name += " (default)"
	}
	return []any{
		name, o.Provisioner,
		string(deref(o.ReclaimPolicy, corev1.PersistentVolumeReclaimDelete)),
		string(deref(o.VolumeBindingMode, storagev1.VolumeBindingImmediate)),
		deref(o.AllowVolumeExpansion, false), age(o.ObjectMeta),
	}
}

func csiDriverColumns() columns {
	doc := storagev1.CSIDriverSpec{}.SwaggerDoc()
	return columns{
		nameColumn(),
		column("AttachRequired", "boolean", doc["attachRequired"]),
		column("PodInfoOnMount", "boolean", doc["podInfoOnMount"]),
		column("StorageCapacity", "boolean", doc["storageCapacity"]),
		column("TokenRequests", "string", doc["tokenRequests"]),
		column("RequiresRepublish", "boolean", doc["requiresRepublish"]),
		column("Modes", "string", doc["volumeLifecycleModes"]),
		ageColumn(),
	}
}

func csiDriverCells(o *storagev1.CSIDriver) []any {
	var modes, audiences []string
	for _, m := range o.Spec.VolumeLifecycleModes {
		modes = append(modes, string(m))
	}
	for _, t := range o.Spec.TokenRequests {
		audiences = append(audiences, t.Audience)
	}
	tokens := "<unset>"
	if o.Spec.TokenRequests != nil {
		tokens = strings.Join(audiences, ",")
	}
	return []any{
		o.Name, deref(o.Spec.AttachRequired, true), deref(o.Spec.PodInfoOnMount, false),
		deref(o.Spec.StorageCapacity, false), tokens, deref(o.Spec.RequiresRepublish, false),
		orNone(strings.Join(modes, ",")), age(o.ObjectMeta),
	}
}

func ingressColumns() columns {
	return columns{
		nameColumn(),
		column("Class", "string", "The name of the IngressClass resource that should be used for additional configuration"),
		column("Hosts", "string", "Hosts that incoming requests are matched against before the ingress rule"),
		column("Address", "string", "Address is a list containing ingress points for the load-balancer"),
		column("Ports", "string", "Ports of TLS configurations that open"),
		ageColumn(),
	}
}

func ingressCells(o *networkingv1.Ingress) []any {
	var addresses []string
	for _, in := range o.Status.LoadBalancer.Ingress {
		addresses = append(addresses, orElse(in.IP, in.Hostname))
	}
	ports := "80"
	if len(o.Spec.TLS) > 0 {
		ports = "80, 443"
	}
	return []any{
		o.Name, deref(o.Spec.IngressClassName, "<none>"), ingressHosts(o.Spec.Rules),
		strings.Join(balancers(addresses), ","), ports, age(o.ObjectMeta),
	}
}

func ingressHosts(rules []networkingv1.IngressRule) string {
	var list []string
	more := false
	for _, r := range rules {
		if len(list) == 3 {
			more = true
			break
		}
		if r.Host != "" {
			list = append(list, r.Host)
		}
	}
	switch {
	case len(list) == 0:
		return "*"
	case more: // the API server counts rules here, not hosts
		return fmt.Sprintf("%s + %d more...", strings.Join(list, ","), len(rules)-3)
	}
	return strings.Join(list, ",")
}

func priorityClassColumns() columns {
	doc := schedulingv1.PriorityClass{}.SwaggerDoc()
	return columns{
		nameColumn(),
		column("Value", "integer", doc["value"]),
		column("Global-Default", "boolean", doc["globalDefault"]),
		ageColumn(),
		column("PreemptionPolicy", "string", doc["preemptionPolicy"]),
	}
}

func priorityClassCells(o *schedulingv1.PriorityClass) []any {
	return []any{o.Name, o.Value, o.GlobalDefault, age(o.ObjectMeta), string(deref(o.PreemptionPolicy, ""))}
}
